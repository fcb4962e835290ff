"`python -m hatemm_clip` is the `hatemm` command."
from hatemm_clip.cli import main

if __name__ == '__main__': main()
