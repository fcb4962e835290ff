"Export the notebooks, write README.md from index.ipynb, clean; with --run, execute every notebook in place first."
import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def execute(path):
    "Run a notebook in place; flagged cells keep their outputs, unless HATEMM_CELLS names their flag."
    from nbclient import NotebookClient

    from hatemm_clip.data import cell_flag
    nb = nbformat.read(path, 4)
    held = {i: (c.source, c.outputs) for i, c in enumerate(nb.cells) if c.cell_type == 'code' and (flag := cell_flag(c.source)) and flag not in os.environ.get('HATEMM_CELLS', '')}
    for i in held: nb.cells[i].source = ''
    NotebookClient(nb, timeout=1800, kernel_name='python3', resources=dict(metadata=dict(path=str(path.parent)))).execute()
    for i, (source, outputs) in held.items(): nb.cells[i].update(source=source, outputs=outputs)
    nbformat.write(nb, path)


def drop_notices(path):
    "A flagged cell that was left out and had nothing to show says so; the file does not keep that."
    nb = nbformat.read(path, 4)
    notices = [c for c in nb.cells if c.cell_type == 'code' and any(o.get('text', '').startswith('Left out: this cell needs') for o in c.outputs)]
    for c in notices: c.outputs = []
    if notices: nbformat.write(nb, path)


def write_readme():
    "README.md is index.ipynb as Markdown, with its pictures in index_files/."
    from nbconvert import MarkdownExporter
    nb = nbformat.read(ROOT/'nbs/index.ipynb', 4)
    nb.cells = [c for c in nb.cells if not re.search(r'^#\s*\|\s*hide\s*$', c.source, re.M)]
    nb.metadata['language_info'] = dict(name='python')
    for c in nb.cells: c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    text, resources = MarkdownExporter().from_notebook_node(nb, dict(output_files_dir='index_files', unique_key='index'))
    for name, data in resources['outputs'].items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(data)
    text = re.sub(r'\]\((?!https?:|#|index_files)([^)]+)\)', r'](nbs/\1)', text)  # links are relative to nbs/
    header = '<!-- Written from nbs/index.ipynb by `make export`: edit that. -->\n\n'
    (ROOT/'README.md').write_text(header + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', encoding='utf-8')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--run', nargs='*', metavar='NOTEBOOK', help='execute these notebooks in place; none named: all')
    parser.add_argument('--readme', action='store_true', help='write README.md only')
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.readme: return write_readme()
    subprocess.run([BIN/'nbdev_export'], check=True)
    if args.run is not None:
        for path in [ROOT/f for f in args.run] or sorted((ROOT/'nbs').glob('*.ipynb')):
            print(path.name, flush=True)
            execute(path)
    for path in sorted((ROOT/'nbs').glob('*.ipynb')): drop_notices(path)
    write_readme()
    subprocess.run([BIN/'nbdev_clean'], check=True)


if __name__ == '__main__': main()
