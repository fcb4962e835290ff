"What pages show besides the notebooks: parameters of public names, boxes, marks on flagged cells."
import ast
import json
import re
import sys

import pytest
from conftest import ROOT

from hatemm_clip.base import FLAGS, cell_flag
from hatemm_clip.stages import STAGES

sys.path.insert(0, str(ROOT/'tools'))
import prepare

pages = pytest.importorskip('pages', reason='needs the development requirement nbdev')
ROOMS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch): monkeypatch.chdir(ROOT)  # where nbdev finds settings.ini


def read_cells(notebook): return [dict(c, source=''.join(c['source'])) for c in json.loads(notebook.read_text())['cells']]


def module_of(notebook): return next(m[1] for c in read_cells(notebook) if (m := re.search(r'#\| default_exp (\w+)', c['source'])))


def shown_names(notebook):
    "Functions and classes of exported cells, which nbdev shows unless their names are private."
    nodes = [n for c in read_cells(notebook) if re.match(r'#\| exports?\n', c['source']) for n in ast.parse(c['source']).body]
    return [n.name for n in nodes if isinstance(n, (*pages.FUNCTIONS, ast.ClassDef)) and n.name[0] != '_']


@pytest.mark.parametrize('notebook', [n for n in ROOMS if shown_names(n)], ids=lambda n: n.stem)
def test_every_public_name_has_its_parameters(notebook):
    name = module_of(notebook)
    module = pages.read_module(name)
    assert set(module.definitions).intersection(module.public) <= set(shown_names(notebook))
    for shown in shown_names(notebook):
        text, definition = pages.describe(shown, name), pages.Definition(module, shown, module.definitions[shown])
        parts = [definition, *definition.methods]
        assert text.count('::: {.parameters}') == sum(p.tells for p in parts), f'{shown}: a table is missing'
        assert definition.signature.startswith('class ') == definition.is_class and 'object at 0x' not in text
        rows = [line for line in text.splitlines() if line.startswith('|')]
        assert all(line.count('|') == 5 for line in rows), f'{shown}: a row of other than four cells'
        for part in parts:
            given = [p.name for p in part.given if p.name != '*']
            assert [row[0] for row in part.rows if row[0]] == given, f'{part.name}: a parameter has no row'
            assert all(len(row[2]) <= 60 for row in part.rows), f'{part.name}: a long default'


def test_a_definition_as_a_page_shows_it(tmp_path, monkeypatch):
    "Types as they are written, defaults short, what is said of each parameter and of the result; worked by hand."
    source = """
__all__ = ['Box', 'fill']
_MANY = 12
FIRST = typer.Option(..., help='Which one.')

@dataclass(frozen=True)
class Box:
    "A box."
    width: int = 3 # in pixels
    # of the sides,
    # outside
    colours: list[str] = field(default_factory=list)
    make: object = field(default_factory=lambda: Box(1))

    @property
    def area(self) -> float: # in square pixels
        "Its area."
        return self.width**2

    def _hidden(self): pass

def fill(
    path: str | Path, # a file; `a|b` and *c*
    *names: str,
    n=_MANY, # how many
    first: str = FIRST,
    words=('aaaaaaaaaaaaaaaaaaaa', 'bbbbbbbbbbbbbbbbbbbbbb', 'cccccccccccccccccccc'),
    **more,
) -> dict[str, int] | None: # name -> count
    "Fill it."

def each(n): return n

class Plain:
    def run(self, n): return n

    def walk(self, n): # int: how far
        return n
"""
    (tmp_path/'toy.py').write_text(source)
    monkeypatch.setattr(pages, 'get_config', lambda: type('Config', (), dict(lib_path=tmp_path)))
    module = pages.Module('toy')
    shown = lambda name: pages.Definition(module, name, module.definitions[name])
    box, fill = shown('Box'), shown('fill')
    assert box.signature == 'class Box(width=3, colours=list(), make=Box(1))'
    assert box.rows == [('width', 'int', '3', 'in pixels'), ('colours', 'list[str]', 'list()', 'of the sides, outside'), ('make', 'object', 'Box(1)', '')]
    assert [(m.name, m.signature, m.rows) for m in box.methods] == [('Box.area', 'Box.area', [('', 'float', '', 'in square pixels')])]
    assert fill.rows[0] == ('path', 'str | Path', '', 'a file; `a|b` and *c*') and fill.rows[1] == ('*names', 'str', '', '')
    assert fill.rows[2:4] == [('n', '', '12', 'how many'), ('first', 'str', '', 'Which one.')]
    assert fill.rows[4][2].endswith('…') and len(fill.rows[4][2]) == pages.MOST + 1
    assert fill.rows[5:] == [('**more', '', '', ''), ('', 'dict[str, int] | None', '', 'name -> count')]
    first, *_, last = pages.table(fill.rows).splitlines()[6:-3]
    assert 'str &#124; Path' in first and first.count('|') == 5 and '&#42;c&#42;' in first and '*returns*' in last
    assert shown('each').rows == [('n', '', '', '')] and not shown('each').tells
    assert [(m.name, m.rows) for m in shown('Plain').methods] == [('Plain.walk', [('n', '', '', 'int: how far')])]


# The boxes

def box_of(notebook):
    "The box of a page, without links."
    cells = read_cells(notebook)
    sources = [c['source'] for c in cells if c['cell_type'] == 'code']
    return pages.box(sources, pages.read_box(cells), notebook.stem, module_of(notebook))


def exists(word, notebook, public):
    "Whether what a box names is there: a definition, a result of a stage, a file, an extra, a flag."
    results = {r for made in STAGES.values() for r in made}
    if word in public | results | {r.split('.')[0] for r in results} | {'hatemm', 'mhc', 'make install'}: return True
    if re.fullmatch(r'\.\w+|\([A-Z, 0-9]+\)', word): return True  # kinds of files, shapes
    if found := re.fullmatch(r"pip install 'hatemm_clip\[(\w+)\]'", word): return found[1] in pages.extras()
    if word in {n for names in pages.extras().values() for n in names}: return True
    if found := re.match(r'(?:%env )?HATEMM_CELLS=(\w+)', word):
        return found[1] in FLAGS and word.endswith((f'={found[1]}', f'python tools/prepare.py --run nbs/{notebook.name}'))
    return word == '../runs/notebook' or word.removeprefix('../shared/') in pages.BESIDE


@pytest.mark.parametrize('notebook', ROOMS, ids=lambda n: n.stem)
def test_every_room_has_a_box_and_what_it_names_is_there(notebook):
    cells, box = read_cells(notebook), box_of(notebook)
    places = [i for i, c in enumerate(cells) if c['cell_type'] == 'markdown' and pages.is_box(c['source'])]
    assert places == [1], f'{notebook.name}: not one box, under the title, but cells {places}'
    for key in ('Takes', 'Gives', 'Needs', 'Time'): assert f'- **{key}** ' in box, f'{notebook.name}: its box does not say {key}'
    public = {name for file in (ROOT/'hatemm_clip').glob('[a-z]*.py') for name in pages.read_module(file.stem).public}
    unknown = [word for word in re.findall(r'`([^`]+)`', box) if not exists(word, notebook, public)]
    assert not unknown, f'{notebook.name}: its box names {unknown}'
    linked = re.findall(r'\]\(([^)]+)\)', box)
    assert all((ROOT/'nbs'/file).exists() for file in linked)
    flags = [flag for c in cells if c['cell_type'] == 'code' and (flag := cell_flag(c['source']))]
    assert ('Flagged cells' in box) == bool(flags) and all(FLAGS[flag] in box for flag in flags)


def test_what_lies_beside_the_clone_is_described():
    "A cell may read the folder `shared` beside the clone; the box says what that holds."
    for notebook in ROOMS:
        read = [c for c in read_cells(notebook) if c['cell_type'] == 'code' and re.search(r"\.\./\.\./shared|'shared/(data|models)", c['source'])]
        assert not [c for c in read if not cell_flag(c['source'])], f'{notebook.name}: a cell without a flag needs what a clone lacks'
        assert not read or '`../shared/' in box_of(notebook), f'{notebook.name} does not say what it reads'


@pytest.mark.parametrize('said, seconds, then', [('', 4, 'seconds'), ('', 31, 'half a minute'), ('', 130, '2 minutes'), ('seconds', 31, 'seconds'),
                                                 ('1 minute', 100, '1 minute'), ('seconds', 130, '2 minutes'), ('20 minutes', 130, '2 minutes')])
def test_a_run_writes_its_time_where_it_is_far_off(said, seconds, then):
    "Coarse, and kept where it is within a factor of two, so that a rerun seldom changes it."
    cell = pages.mk_cell('- **Takes**: words' + f'\n- **Time**: {said}' * bool(said), 'markdown')
    nb = type('Notebook', (), dict(cells=[pages.mk_cell('# Title', 'markdown'), cell]))
    prepare.write_time(nb, seconds)
    assert pages.read_box(nb.cells) == dict(Takes='words', Time=then)
