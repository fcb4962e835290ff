"Packaging: everything comes from settings.ini; the notebooks, which `hatemm run` runs, travel inside the package."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def lines(key):  # a multi-line setting as a list
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


class BuildWithNotebooks(build_py):
    "Copies nbs/ into the package of a wheel; an editable install finds it in the clone."

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return
        target = Path(self.build_lib) / cfg["lib_name"] / "notebooks"
        for source in [*sorted((HERE / cfg["nbs_path"]).glob("*.ipynb")), *sorted((HERE / cfg["nbs_path"] / "params").glob("*.yml"))]:
            file = target / source.relative_to(HERE / cfg["nbs_path"])
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, file)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"].replace("%(user)s", cfg["user"]).replace("%(repo)s", cfg["repo"]),
    license="Apache-2.0",
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    package_data={cfg["lib_name"]: ["assets/*"]},
    cmdclass={"build_py": BuildWithNotebooks},
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require={name: lines(f"{name}_requirements") for name in ("dev", "emotion", "ray", "real", "search", "serve", "vlm")},
    entry_points={
        "console_scripts": lines("console_scripts") or [cfg["console_scripts"]],
        "nbdev": [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d'],  # symbols link to their pages and sources
    },
)
