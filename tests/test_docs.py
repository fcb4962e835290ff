"The docs tree builds: every notebook stages to a page with a title, the sidebar has them all, internal links resolve."
import json
import re
import shutil

import pytest
import yaml
from conftest import ROOT


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The staged site, as nbdev hands it to Quarto."
    folder = tmp_path_factory.mktemp('docs')
    shutil.copytree(ROOT/'nbs', folder/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/name, folder)
    shutil.copytree(ROOT/'hatemm_clip', folder/'hatemm_clip', ignore=shutil.ignore_patterns('__pycache__', 'assets'))
    import subprocess
    import sys
    stage = 'from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml; from nbdev.serve import proc_nbs; refresh_quarto_yml(); nbdev_sidebar.__wrapped__(); proc_nbs(n_workers=0)'
    subprocess.run([sys.executable, '-c', stage], cwd=folder, check=True, capture_output=True, timeout=300)
    return folder


def test_every_notebook_becomes_a_page_with_a_title(site):
    for notebook in (site/'nbs').glob('*.ipynb'):
        page = site/'_proc'/notebook.name
        assert page.exists(), f'{notebook.name} was not staged'
        assert re.search(r'title: \S', page.read_text()), f'{notebook.name} has no title'


def test_sidebar_lists_every_page(site):
    contents = yaml.safe_load((site/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']
    assert sorted(contents) == sorted(f.name for f in (site/'nbs').glob('*.ipynb'))


def test_internal_links_resolve(site):
    for notebook in (site/'nbs').glob('*.ipynb'):
        prose = '\n'.join(''.join(c['source']) for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'markdown')
        for link in re.findall(r'\]\((?!https?:|#|data:|attachment:)([^)\s`]+?)(?:#[^)]*)?\)', prose):
            assert (site/'nbs'/link).exists(), f'{notebook.name} links to {link}, which is not there'
