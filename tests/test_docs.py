"The docs tree builds: every notebook becomes a page with a title, the sidebar has them all by group, internal links resolve."
import html
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A clone with what is not committed yet, whose site is staged by `make docs`, with a renderer that writes one page."
    folder, tools = tmp_path_factory.mktemp('docs')/'clone', tmp_path_factory.mktemp('bin')
    git = lambda *args: subprocess.run(['git', '-C', *map(str, args)], capture_output=True, text=True, check=True).stdout
    git(ROOT, 'clone', '--quiet', ROOT, folder)
    for name in filter(None, git(ROOT, 'ls-files', '-z', '--modified', '--others', '--exclude-standard').split('\0')):
        (folder/name).unlink(missing_ok=True)
        if not (ROOT/name).exists(): continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, folder/name, follow_symlinks=False)
    git(folder, 'add', '--all')
    (tools/'quarto').write_text('#!/bin/sh\n[ "$1" = render ] && mkdir -p "$2/_docs" && touch "$2/_docs/index.html"\n')
    (tools/'quarto').chmod(0o755)
    path = os.pathsep.join([str(tools), os.path.dirname(sys.executable), os.environ['PATH']])
    done = subprocess.run(['make', '-o', '.venv/.installed', 'docs'], cwd=folder, env=os.environ | dict(PATH=path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_every_notebook_becomes_a_page_with_a_title(site):
    for notebook in (site/'nbs').glob('*.ipynb'):
        page = site/'_proc'/notebook.name
        assert page.exists(), f'{notebook.name} was not staged'
        assert re.search(r'title: \S', page.read_text()), f'{notebook.name} has no title'


def listed(contents):
    "The files that a part of the sidebar names, in its order."
    for item in contents:
        if isinstance(item, str): yield item
        elif 'section' in item: yield from listed(item['contents'])
        else: yield item['href']


@pytest.fixture(scope='module')
def sidebar(site):
    "Section → what it holds."
    contents = yaml.safe_load((site/'_proc/sidebar.yml').read_text())['website']['sidebar']['contents']
    return {part['section']: part['contents'] for part in contents}


def test_the_sidebar_names_every_page_once(site, sidebar):
    pages = [page for contents in sidebar.values() for page in listed(contents)]
    there = [f.name for f in (site/'_proc').iterdir() if f.suffix in ('.ipynb', '.md')]
    assert sorted(pages) == sorted(there)


def test_the_sidebar_begins_with_the_roads(sidebar):
    assert list(sidebar) == ['Start', 'How to', 'Results', 'Notebooks', 'Look up']
    roads = list(listed(sidebar['Start']))
    assert roads[:4] == ['index.ipynb', 'start_lab.ipynb', '98_own_videos.ipynb', 'start_hatemm.ipynb'] and '91_queue.ipynb' in roads
    assert {f.name for f in (ROOT/'nbs').glob('start_*.ipynb')} < set(roads)
    assert len(sidebar['How to']) >= 6 and all(page.startswith('howto_') for page in sidebar['How to'])


def test_rooms_are_listed_by_group_in_their_order(sidebar):
    rooms = list(listed(sidebar['Notebooks']))
    assert rooms == sorted(rooms) and len(sidebar['Notebooks']) > 5 and all(group['contents'] for group in sidebar['Notebooks'])


def test_groups_are_closed_and_roads_open(preview):
    "On the first page; a group opens when a page of its own is shown."
    page = (preview[0]/'index.html').read_text()
    opened = dict(re.findall(r'menu-text">([^<]+)</span>.{0,600}?aria-expanded="(true|false)"', page, re.S))
    assert opened.get('Start') == opened.get('How to') == 'true' and opened.get('Fusion') == 'false'


def test_readers_find_their_roads_on_the_first_screen(sidebar):
    text = (ROOT/'README.md').read_text()
    first = text[:text.index('## Two commands')]
    roads = [page for page in listed(sidebar['Start']) if page != 'index.ipynb']
    assert first.count('\n') < 25 and all(f'](nbs/{page})' in first for page in roads)
    assert all(f'](nbs/{page})' in text for page in sidebar['How to'])


# What Quarto reads and the preview does not: other formats, and the names of pages, which are those of the notebooks anyway.
QUARTO_ONLY = re.compile(r'format commonmark is not built|format.html.(keep-md|grid|html-math-method) is ignored|output-file is not read')


@pytest.fixture(scope='module')
def preview(site):
    "The site as smalldocs renders it, and what it warns about: options it does not know, links that lead nowhere."
    pytest.importorskip('smalldocs', reason='needs the development requirement smalldocs')
    done = subprocess.run([sys.executable, '-m', 'smalldocs.cli', 'render', str(site/'_proc')], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return site/'_proc/_docs', done.stderr.splitlines()


def test_preview_has_no_doubts(preview):
    warnings = [line for line in preview[1] if line.startswith('warning:') and not QUARTO_ONLY.search(line)]
    assert not warnings, warnings


def test_every_page_renders(site, preview):
    for notebook in (site/'nbs').glob('*.ipynb'):
        page, cells = preview[0]/f'{notebook.stem}.html', json.loads(notebook.read_text())['cells']
        title = ''.join(cells[0]['source']).splitlines()[0].removeprefix('# ')
        text = page.read_text()
        assert f'<title>{html.escape(title, quote=False)}' in text and len(text) > 5000, f'{notebook.name} does not render'


def test_symbols_link_to_their_pages_and_sources(site):
    "The entry point `nbdev` of setup.py makes them; private names have none."
    pages = {page.name: page.read_text() for page in (site/'_proc').glob('*.ipynb')}
    modules = set(re.findall(r'output-file: ([a-z_0-9]+\.html)', ' '.join(pages.values())))
    assert sum(text.count('[source](https://github.com/') for text in pages.values()) > 500
    links = {name: re.findall(r'\]\(https://hatemm-clip\.github\.io/hatemm_clip/([a-z_0-9.]+)(?:#([^)]*))?\)', text) for name, text in pages.items()}
    assert sum(map(len, links.values())) > 100
    for name, found in links.items():
        assert not [anchor for _, anchor in found if anchor.startswith('_')], f'{name} links to a private name'
        assert not [page for page, _ in found if page not in modules], f'{name} links to a page that is not there'


def staged(site, notebook): return [(c['cell_type'], ''.join(c['source'])) for c in json.loads((site/'_proc'/notebook.name).read_text())['cells']]


def test_staged_pages_have_tables_boxes_and_marks(site):
    "Nothing is left of `show_doc`; a box stands on top; a mark stands before each flagged cell; what teaches is shown."
    flags = re.compile(r'^#\| (slow|cuda|net|data)$', re.M)
    for notebook in (site/'nbs').glob('[0-9]*.ipynb'):
        cells, sources = staged(site, notebook), [''.join(c['source']) for c in json.loads(notebook.read_text())['cells']]
        prose = [source for kind, source in cells if kind == 'markdown']
        assert not [source for kind, source in cells if kind == 'code' and 'show_doc(' in source], notebook.name
        assert prose[0].startswith('::: {.room}') and not [p for p in prose if p.startswith('- **Takes**')], f'{notebook.name}: no box'
        marks = [i for i, (_, source) in enumerate(cells) if source.startswith('::: {.flagged}')]
        flagged = [flags.sub('', s).strip().splitlines()[-1] for s in sources if flags.match(s)]
        assert [cells[i + 1][1].strip().splitlines()[-1] for i in marks] == flagged, f'{notebook.name}: a flagged cell without its mark'
        shown = [s.split('\n', 1)[1].strip() for s in sources if s.startswith('#| exports\n')]
        code = '\n'.join(source for kind, source in cells if kind == 'code')
        assert all(s in code for s in shown), f'{notebook.name}: an exported cell that teaches is not shown'


def test_tables_of_parameters_have_four_cells_a_row(preview):
    "As they are rendered: a pipe in a type or a comment must not end a cell."
    tables = [t for page in preview[0].glob('*.html') for t in re.findall(r'<div class="parameters">(.*?)</div>', page.read_text(), re.S)]
    rows = [row for table in tables for row in re.findall(r'<tr\b.*?</tr>', table, re.S)]
    assert len(tables) > 900 and {len(re.findall(r'<t[dh]\b', row)) for row in rows} == {4}
    assert any('<code>str | Path</code>' in html.unescape(row) for row in rows)


def figures(notebook):
    "Cells with a stored picture, and what they tell Quarto about it."
    for cell in json.loads(notebook.read_text())['cells']:
        if not any(kind.startswith('image/') for o in cell.get('outputs', []) for kind in o.get('data', {})): continue
        options = re.findall(r'^#\| (fig-\w+: .+)$', ''.join(cell['source']), re.M)
        yield cell['id'], yaml.safe_load('\n'.join(options)) or {}


def test_every_figure_has_a_caption_and_an_alternative_text():
    found = [(f'{n.name}, cell {cell}', o) for n in (ROOT/'nbs').glob('*.ipynb') for cell, o in figures(n)]
    bare = [where for where, o in found if not all(str(o.get(k) or '').strip() for k in ('fig-cap', 'fig-alt'))]
    assert found and not bare, f'without fig-cap or fig-alt: {bare}'


FOUND = re.compile(r' 0 new\b|is there already|[1-9]\d* found finished')  # what a run prints that had nothing to do


def test_the_first_page_shows_a_run_that_did_something():
    page = (ROOT/'README.md').read_text()
    assert ', 160 new, 0 failed' in page and ' x real time' in page
    assert not FOUND.search(page)


RUN_TWICE = {'008_rows', '80_retrieval'}  # pages on what a second run does


def test_no_page_shows_a_run_that_did_nothing():
    showing = set()
    for notebook in (ROOT/'nbs').glob('*.ipynb'):
        outputs = [o for cell in json.loads(notebook.read_text())['cells'] for o in cell.get('outputs', [])]
        if FOUND.search(''.join(''.join(o.get('text', '')) for o in outputs)): showing.add(notebook.stem)
    assert showing == RUN_TWICE


def test_every_picture_on_a_page_has_an_alternative_text(preview):
    bare = []
    for page in preview[0].rglob('*.html'):
        tags = re.findall(r'<img\b[^>]*>', page.read_text())
        bare += [f'{page.name}: {tag[:80]}' for tag in tags if not re.search(r'\salt=(["\'])\s*[^\s"\']', tag)]
    assert not bare, bare


def test_pages_show_what_cells_say_of_their_figures(preview):
    for notebook in (ROOT/'nbs').glob('*.ipynb'):
        text = (preview[0]/f'{notebook.stem}.html').read_text()
        for cell, options in figures(notebook):
            alt, caption = (html.escape(options[k]) for k in ('fig-alt', 'fig-cap'))
            both = f'alt="{alt}"' in text and f'<figcaption>{caption}</figcaption>' in text
            assert both, f'{notebook.name}, cell {cell}: its caption or alternative text is lost'


def test_links_and_anchors_of_the_built_site(preview, tmp_path):
    "As the workflow checks it; Quarto names a page after its module, the preview after its notebook, so here it has both names."
    built = shutil.copytree(preview[0], tmp_path/'docs')
    for notebook in (ROOT/'nbs').glob('*.ipynb'):
        module = re.search(r'#\| default_exp (\w+)', notebook.read_text())
        if module: (built/f'{module[1]}.html').symlink_to(f'{notebook.stem}.html')
    command = [sys.executable, str(ROOT/'tools/check_site.py'), str(built), 'https://hatemm-clip.github.io/hatemm_clip/']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_what_is_wrong_with_a_site_is_said(tmp_path):
    (tmp_path/'a.html').write_text('<h1 id="top">A</h1><a href="b.html">b</a><a href="#none">n</a><img src="x.png"><a href="#top">t</a>')
    done = subprocess.run([sys.executable, str(ROOT/'tools/check_site.py'), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and '1 pages, 3 faults' in done.stdout
    for fault in ('broken link: b.html', 'no such anchor: #none', 'picture without alt: x.png'): assert fault in done.stdout


def test_internal_links_resolve(site):
    for notebook in (site/'nbs').glob('*.ipynb'):
        prose = '\n'.join(''.join(c['source']) for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'markdown')
        for link in re.findall(r'\]\((?!https?:|#|data:|attachment:)([^)\s`]+?)(?:#[^)]*)?\)', prose):
            assert (site/'nbs'/link).exists(), f'{notebook.name} links to {link}, which is not there'


def test_the_reference_is_that_of_the_program():
    from hatemm_clip.reference import command_reference
    [shown] = [o['data']['text/markdown'] for cell in json.loads((ROOT/'nbs/99_reference.ipynb').read_text())['cells']
               for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})]
    assert ''.join(shown) == command_reference(), 'run nbs/99_reference.ipynb: a command has changed'


def test_make_docs_changes_no_file_of_the_clone(site):
    "The staged sidebar is ours, not nbdev's."
    for command in (['diff', '--name-only'], ['ls-files', '--others', '--exclude-standard']):
        changed = subprocess.run(['git', *command], cwd=site, capture_output=True, text=True, check=True).stdout
        assert not changed, changed
    assert (site/'_docs/index.html').exists() and (site/'_proc/sidebar.yml').read_text() == (ROOT/'nbs/sidebar.yml').read_text()
