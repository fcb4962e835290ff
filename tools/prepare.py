"Export the notebooks, write README.md and the sidebar, clean; with --run, execute every notebook in place first."
import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
GROUPS = {'Ground': '000', 'Data': '00_', 'Numbers': '05', 'Speech': '07', 'Features': '15', 'Fine-tuning': '26', 'Fusion': '33',
          'Robustness': '46', 'Where and why': '52', 'Reading': '58', 'Memes': '70', 'Search': '78', 'Use': '82',
          'Running': '91_s'}  # group → number of its first room
START = ('start_lab', '98_own_videos', 'start_hatemm', '91_queue', 'start_memes', 'start_search', 'start_when')  # roads


def read_cells(path):
    "The sources of a notebook's cells."
    return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]


def read_title(path):
    "A notebook's title and summary."
    return re.match(r'# (.+)\n+> (.+)', read_cells(path)[0]).groups()


def read_room(path):
    "A notebook's file name, module, title, summary, and whether it holds a stage."
    cells, (title, summary) = read_cells(path), read_title(path)
    module = next(s.split()[-1] for s in cells if s.startswith('#| default_exp'))
    stage = any(re.match(r'## The stage\b', s) for s in cells)
    return dict(file=path.name, module=module, title=title, summary=summary, stage=stage)


def read_groups():
    "Group → its rooms, in the order of their numbers."
    groups = {name: [] for name in GROUPS}
    for path in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
        group = [name for name, first in GROUPS.items() if path.name >= first][-1]
        groups[group].append(read_room(path))
    return {name: rooms for name, rooms in groups.items() if rooms}


def rooms_table():
    "The rooms by group, as Markdown."
    lines = ['| group | notebook | what it is about |', '|---|---|---|']
    for group, rooms in read_groups().items():
        for i, room in enumerate(rooms):
            link = f"[{room['file'][:-6]}]({room['file']})"
            lines.append(f"| {group if i == 0 else ''} | {f'**{link}**' if room['stage'] else link} | {room['summary']} |")
    return '\n'.join(lines)


def how_to_pages():
    "File names of the pages that answer one question, by title."
    pages = {path.name: read_title(path) for path in (ROOT/'nbs').glob('howto_*.ipynb')}
    return sorted(pages, key=pages.get)


def how_to_list():
    "The questions, with what their pages say, as Markdown."
    lines = []
    for name in how_to_pages():
        title, summary = read_title(ROOT/'nbs'/name)
        lines.append(f'- [{title}]({name}): {summary[0].lower() + summary[1:]}')
    return '\n'.join(lines)


def sidebar():
    "What the site lists at its side: the roads, the questions, the rooms by group, and what is looked up."
    start = [f'{page}.ipynb' for page in START]
    results = sorted(path.name for path in (ROOT/'nbs').glob('results_*.ipynb'))
    elsewhere = {*start, '99_reference.ipynb'}
    groups = {name: [room['file'] for room in rooms if room['file'] not in elsewhere] for name, rooms in read_groups().items()}
    rooms = [dict(section=name, contents=files) for name, files in groups.items()]
    return [dict(section='Start', contents=[dict(text='Quick start', href='index.ipynb'), *start]),
            dict(section='How to', contents=how_to_pages()),
            dict(section='Results', contents=results),
            dict(section='Notebooks', contents=rooms),
            dict(section='Look up', contents=['glossary.ipynb', '99_reference.ipynb', 'changelog.md', 'contributing.md'])]


def write_sidebar():
    "nbs/sidebar.yml lists the pages; sections within sections are closed until a page of theirs is open."
    text = yaml.safe_dump(dict(website=dict(sidebar=dict({'collapse-level': 2}, contents=sidebar()))), sort_keys=False)
    header = '# Written by `make export` from the notebooks and the names in tools/prepare.py.\n'
    (ROOT/'nbs/sidebar.yml').write_text(header + text, encoding='utf-8')


def coarse(seconds):
    "How long a notebook takes, as its box says it: coarse, so that it stays true on another machine."
    if seconds < 20: return 'seconds'
    if seconds < 45: return 'half a minute'
    minutes = round(seconds/60)
    return f'{minutes} minutes' if minutes > 1 else '1 minute'


def write_time(nb, seconds):
    "Put the line `Time` into the box under the title, unless what stands there is near enough."
    cell, line = nb.cells[1], f'- **Time**: {coarse(seconds)}'
    if not re.match(r'- \*\*(Takes|Gives|Time)\*\*: ', cell.source): return
    said = re.search(r'^- \*\*Time\*\*: .*$', cell.source, re.M)
    near = {f'- **Time**: {coarse(seconds*share)}' for share in (.5, .75, 1, 1.5, 2)}
    if said and said[0] not in near: cell.source = cell.source.replace(said[0], line)
    if not said: cell.source += '\n' + line


def execute(path):
    "Run a notebook in place; flagged cells keep their outputs, unless HATEMM_CELLS names their flag."
    from nbclient import NotebookClient

    from hatemm_clip.base import cell_flag, remove
    from hatemm_clip.pipeline import kernel_over_files
    nb = nbformat.read(path, 4)
    held = {i: (c.source, c.outputs) for i, c in enumerate(nb.cells) if c.cell_type == 'code' and (flag := cell_flag(c.source)) and flag not in os.environ.get('HATEMM_CELLS', '')}
    for i in held: nb.cells[i].source = ''
    remove(ROOT/'runs'/path.stem)  # of an earlier time: the page shows what is done, not what is found
    began = time.time()
    with kernel_over_files() as config:
        NotebookClient(nb, kernel_name='python3', config=config, resources=dict(metadata=dict(path=str(path.parent)))).execute()
    for i, (source, outputs) in held.items(): nb.cells[i].update(source=source, outputs=outputs)
    if not os.environ.get('HATEMM_CELLS'): write_time(nb, time.time() - began)
    nbformat.write(nb, path)


def as_prose(cell):
    "A cell whose code is not shown, as the Markdown that it printed."
    if cell.cell_type != 'code' or not re.match(r'#\|\s*echo: false', cell.source): return cell
    return nbformat.v4.new_markdown_cell('\n\n'.join(o.data['text/markdown'] for o in cell.outputs))


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
    nb.cells = [as_prose(c) for c in nb.cells]
    told = iter(re.findall(r'^#\| fig-alt: "(.*)"$', '\n'.join(c.source for c in nb.cells), re.M))
    for c in nb.cells: c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    text, resources = MarkdownExporter().from_notebook_node(nb, dict(output_files_dir='index_files', unique_key='index'))
    for name, data in resources['outputs'].items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(data)
    text = re.sub(r'\]\((?!https?:|#|index_files)([^)]+)\)', r'](nbs/\1)', text)  # links are relative to nbs/
    text = re.sub(r'nbs/(changelog|contributing)\.md', lambda m: f'{m[1].upper()}.md', text)  # pages of the site that are links
    text = re.sub(r'!\[png\]', lambda _: f'![{next(told)}]', text)
    header = '<!-- Written from nbs/index.ipynb by `make export`: edit that. -->\n\n'
    (ROOT/'README.md').write_text(header + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', encoding='utf-8')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--run', nargs='*', metavar='NOTEBOOK', help='execute these notebooks in place; none named: all')
    parser.add_argument('--readme', action='store_true', help='write README.md and the sidebar only')
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.readme: return write_readme(), write_sidebar()
    subprocess.run([BIN/'nbdev_export'], check=True)
    if args.run is not None:
        for path in [ROOT/f for f in args.run] or sorted((ROOT/'nbs').glob('*.ipynb')):
            print(path.name, flush=True)
            execute(path)
    for path in sorted((ROOT/'nbs').glob('*.ipynb')): drop_notices(path)
    write_readme()
    write_sidebar()
    subprocess.run([BIN/'nbdev_clean'], check=True)


if __name__ == '__main__': main()
