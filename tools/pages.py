"""What the pages of the site show besides the notebooks: the parameters of every public name, a box on top of a room,
marks on flagged cells. Processors of nbdev, named in settings.ini; definitions are read from the source and nothing runs."""
import ast
import configparser
import io
import re
import tokenize
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from execnb.nbio import mk_cell, read_nb
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor

from hatemm_clip.base import FLAGS, cell_flag
from hatemm_clip.stages import NEEDS, STAGES

MOST = 44  # characters of a default that is shown
WIDTH = 84  # characters of a line of a signature
HEADER = ('name', 'type', 'default', 'meaning')
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# Definitions

class Module:
    "A module of the package: lines, comments by line, definitions and values by name."

    def __init__(self, name):
        source = (get_config().lib_path/f'{name}.py').read_text(encoding='utf-8')
        self.lines, body = source.splitlines(), ast.parse(source).body
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comments = {t.start[0]: t.string.lstrip('# ').rstrip() for t in tokens if t.type == tokenize.COMMENT}
        self.definitions = {n.name: n for n in body if isinstance(n, (*FUNCTIONS, ast.ClassDef))}
        self.values = {t.id: n.value for n in body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        self.public = ast.literal_eval(self.values['__all__']) if '__all__' in self.values else []

    def is_comment(self, line): return self.lines[line - 1].lstrip().startswith('#')


read_module = lru_cache(maxsize=None)(Module)


@dataclass
class Parameter:
    "A parameter, or the field of a class: its name as it is written, and where it begins and ends."
    name: str
    kind: ast.AST | None
    default: ast.AST | None
    first: int
    last: int


def parameter(node, kind, default, star=''):
    name = getattr(node, 'arg', None) or node.target.id
    return Parameter(star + name, kind, default, node.lineno, max(n.end_lineno for n in (node, default) if n))


def parameters_of(function, bound):
    "Parameters of a function; bound: without the first."
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None]*(len(plain) - len(given.defaults)) + given.defaults
    found = [parameter(a, a.annotation, d) for a, d in zip(plain, defaults)][bound:]
    if given.vararg: found.append(parameter(given.vararg, given.vararg.annotation, None, '*'))
    elif given.kwonlyargs: found.append(Parameter('*', None, None, 0, 0))
    found += [parameter(a, a.annotation, d) for a, d in zip(given.kwonlyargs, given.kw_defaults)]
    if given.kwarg: found.append(parameter(given.kwarg, given.kwarg.annotation, None, '**'))
    return found


def fields_of(node):
    "Public fields of a class that has no `__init__` of its own."
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and n.target.id[0] != '_']
    return [parameter(n, n.annotation, n.value) for n in fields]


def called(node): return ast.unparse(node.func).split('.')[-1] if isinstance(node, ast.Call) else ''


def given_default(node, module):
    "The default that a call of `field` or of typer's stands for; any other as it is."
    if isinstance(node, ast.Name) and called(module.values.get(node.id)) in ('Option', 'Argument'): node = module.values[node.id]
    if called(node) in ('Option', 'Argument'):
        return None if isinstance(node.args[0], ast.Constant) and node.args[0].value is ... else node.args[0]
    if called(node) != 'field': return node
    words = {k.arg: k.value for k in node.keywords}
    made = words.get('default_factory')
    if made is None: return words.get('default')
    return made.body if isinstance(made, ast.Lambda) else ast.Call(made, [], [])


def help_of(node, module):
    "What typer says of an option."
    if isinstance(node, ast.Name): node = module.values.get(node.id)
    if called(node) not in ('Option', 'Argument'): return ''
    return next((k.value.value for k in node.keywords if k.arg == 'help' and isinstance(k.value, ast.Constant)), '')


def short(node, module):
    "Source of a default, cut where it is long; a private name stands for its value."
    if isinstance(node, ast.Name) and node.id[0] == '_': node = module.values.get(node.id, node)
    text = ast.unparse(node) if node is not None else ''
    return text if len(text) <= MOST else text[:MOST].rstrip() + '…'


def type_text(node): return ast.unparse(node).strip('\'"') if node is not None else ''


class Definition:
    "A function, a class or a method as a page shows it."

    def __init__(self, module, name, node, owner=None):
        self.module, self.name, self.node = module, name, node
        self.is_class = isinstance(node, ast.ClassDef)
        made = [n for n in node.body if isinstance(n, FUNCTIONS) and n.name == '__init__'] if self.is_class else [node]
        marks = [ast.unparse(d) for d in node.decorator_list]
        self.is_property = not self.is_class and any(m.split('.')[-1] in ('property', 'cached_property') for m in marks)
        bound = self.is_class or owner is not None and 'staticmethod' not in marks
        self.given = parameters_of(made[0], bound) if made else fields_of(node)

    @property
    def doc(self): return (ast.get_docstring(self.node) or '').split('\n\n')[0].replace('\n', ' ')

    @property
    def methods(self):
        "Public methods and properties of a class, and `__call__`."
        inner = [n for n in self.node.body if isinstance(n, FUNCTIONS)] if self.is_class else []
        shown = {n.name: n for n in inner if n.name[0] != '_' or n.name == '__call__'}
        found = [Definition(self.module, f'{self.name}.{name}', node, owner=self) for name, node in shown.items()]
        return [m for m in found if m.doc or m.tells]

    def comment(self, item):
        "The comment at the end of a parameter's last line, if no other follows there; else those above it."
        comments, sharing = self.module.comments, [p for p in self.given if p.last == item.last]
        if sharing and sharing[-1] is item and item.last in comments and item.last != self.result_line: return comments[item.last]
        above, line = [], item.first - 1
        while line > self.node.lineno and self.module.is_comment(line):
            above, line = [comments[line], *above], line - 1
        return ' '.join(above)

    @property
    def result_line(self):
        "The line whose comment is of what is returned: that of the annotation, or else the one that closes the signature."
        if self.is_class: return None
        returns, body = self.node.returns, self.node.body[0].lineno
        if returns is not None: return returns.end_lineno
        last = max([p.last for p in self.given], default=self.node.lineno)
        return next((n for n in range(last + 1, body) if self.module.lines[n - 1].startswith(('):', '    ):'))), None)

    @property
    def rows(self):
        "Name, type, default and meaning of each parameter, and of what is returned."
        shown = [p for p in self.given if p.name != '*']
        found = [(p.name, type_text(p.kind), short(given_default(p.default, self.module), self.module),
                  self.comment(p) or help_of(p.default, self.module)) for p in shown]
        if self.is_class: return found
        kind, said = type_text(self.node.returns), self.module.comments.get(self.result_line, '')
        return found + [('', '' if kind == 'None' else kind, '', said)] if said or kind not in ('', 'None') else found

    @property
    def tells(self): return any(kind or said for _, kind, _, said in self.rows)  # more than the signature does

    @property
    def signature(self):
        "As one writes it, without the types, which are in the table."
        pairs = [(p.name, short(given_default(p.default, self.module), self.module)) for p in self.given]
        parts = [f'{name}={default}' if default else name for name, default in pairs]
        start = ('class ' if self.is_class else 'async ' if isinstance(self.node, ast.AsyncFunctionDef) else '') + self.name
        if self.is_property: return start
        line = f'{start}({", ".join(parts)})'
        return line if len(line) <= WIDTH else f'{start}(\n    ' + ',\n    '.join(parts) + ',\n)'


# Their Markdown

def literal(text):
    "Code in a cell of a table: no character of it means anything to Markdown, whichever reads it."
    escaped = ''.join(c if c.isalnum() or c in ' .,:=' else f'&#{ord(c)};' for c in text)
    return f'<code>{escaped}</code>' if text else ''


def prose(text):
    "A comment in a cell of a table; pipes do not end the cell, and stars and the like are themselves."
    parts = re.split(r'(`[^`]+`)', text)
    def written(part):
        if part[:1] == '`': return literal(part[1:-1]) if '|' in part else part
        return re.sub(r'[|*_^~<>$\[\]\\@#{}]', lambda m: f'&#{ord(m[0])};', part)
    return ''.join(map(written, parts))


def table(rows):
    "A table of parameters as Markdown, folded: a page is read for its lessons first."
    lines = ['| ' + ' | '.join(HEADER) + ' |', '|:---------|:---------|:-------|:--------------------|']
    for name, kind, default, said in rows:
        cells = (literal(name) or ('*yields*' if said.startswith('yields ') else '*returns*'), literal(kind), literal(default), prose(said.removeprefix('yields ')))
        lines.append('| ' + ' | '.join(cells) + ' |')
    inside = ['::: {.parameters}', *lines, ':::']
    return '<details>\n<summary>Parameters</summary>\n\n' + '\n'.join(inside) + '\n\n</details>'


def body(definition):
    "Signature, docstring and table."
    shown = f'```python\n{definition.signature}\n```'
    return '\n\n'.join(filter(None, [shown, definition.doc and f'*{prose(definition.doc)}*', table(definition.rows) if definition.tells else '']))


def describe(name, module):
    "All that a page says of a public name; `name`: of a function, a class, or `Class.method`."
    owner, _, method = name.partition('.')
    found = Definition(read_module(module), owner, read_module(module).definitions[owner])
    if method: found = next(m for m in found.methods if m.name == name)
    path = f'{get_config().git_url}/blob/{get_config().branch}/{get_config().lib_path.name}/{module}.py'
    source = f'[source]({path}#L{found.node.lineno}){{target="_blank" style="float:right; font-size:smaller"}}'
    methods = [f'::: {{#{m.name.lower()} .method}}\n{body(m)}\n:::' for m in found.methods]  # nbdev links to these anchors
    below = ['::: {.methods}', *methods, ':::'] if methods else []
    return '\n\n'.join(['---', source, f'### {name}', body(found), *below])


def module_of(nb): return nb.frontmatter_['output-file'].removesuffix('.html')


class show_definitions(Processor):
    "What nbdev would run `show_doc(NAME)` for."
    def begin(self):
        self.module, self.links = module_of(self.nb), NbdevLookup()

    def cell(self, cell):
        shown = re.search(r'^show_doc\(([\w.]+)', cell.source, re.M) if cell.cell_type == 'code' else None
        if not shown: return
        cell.update(cell_type='markdown', source=self.links.linkify(describe(shown[1], self.module)))
        for key in ('outputs', 'execution_count'): cell.pop(key, None)


# Flagged cells

def mark(flag, has_outputs):
    "A line before a flagged cell: what it needs, how to run it, and where what it shows is from."
    shown = ' What it shows is from such a run.' if has_outputs else ''
    return f'::: {{.flagged}}\nNeeds {FLAGS[flag]}: left out, unless `%env HATEMM_CELLS={flag}` ran before it.{shown}\n:::'


class mark_flagged(Processor):
    def begin(self):
        cells = []
        for cell in self.nb.cells:
            flag = next((f for f in FLAGS if f in (cell.get('directives_') or {})), None)
            if flag: cells.append(mk_cell(mark(flag, bool(cell.get('outputs'))), 'markdown'))
            cells.append(cell)
        self.nb.cells = cells


# The box on top of a room

BESIDE = {  # what some flagged cells read from a folder `shared` beside the clone → what that holds
    'data/hatemm': "HateMM's annotations, as they are published (Zenodo 7799469)",
    'data/hatemm/hatemm_bert_mfcc.npz': 'features of all HateMM videos, BERT and MFCC, with five folds '
                                        '(github.com/sha9189/multimodal-hate-video-classification)',
    'data/hatemm/hatemm_vosk_transcripts.json': 'Vosk transcripts of HateMM, from the same place',
    'data/hatemm/transcripts_train_validation.csv': 'other transcripts of HateMM (github.com/Social-AI-Studio/CrossModalTransferLearning)',
    'data/mhc_en': "MultiHateClip's English tables and texts (github.com/Social-AI-Studio/MultiHateClip)",
    'data/memes/sg_memes_256px.tar': 'Singapore memes: pictures and labels (github.com/edbertekaputera/Memes_safety_predictor)',
    'data/memes/multioff_text_labels_clipzs.csv': 'MultiOFF: texts and labels, without pictures (github.com/vasilikikou/memegraphs)',
    'data/memes/fhm_aligned_with_hatemm.csv': 'Hateful Memes with old and new labels and votes '
                                              '(github.com/Social-AI-Studio/CrossModalTransferLearning)',
    'data/topics/youtube_6topics_10333.csv': 'titles of YouTube videos of six topics (github.com/agrawal-rohit/youtube-video-classification)',
    'data/retrieval/msrvtt_test68_e.json': 'captions of MSR-VTT with published emotion columns (github.com/Hyejin3194)',
    'data/ee559_results': 'per-epoch results of an earlier study (github.com/alexcaldarone/EE-559-project)',
    'data/videos': 'a few free clips: NASA, GRID and MDN',
    'models/whisper-tiny.en.pt': "Whisper tiny.en in openai-whisper's own form"}


def is_box(source): return source.startswith('- **') and bool(LINE.match(source))


LINE = re.compile(r'^- \*\*(Takes|Gives|Time)\*\*: (.+)$', re.M)


def read_box(cells):
    "What the cell under the title says: Takes, Gives, Time → text."
    return next((dict(LINE.findall(c['source'])) for c in cells if c['cell_type'] == 'markdown' and is_box(c['source'] or '')), {})


def extras():
    "Extra → the names under which its packages are imported."
    settings = configparser.ConfigParser(delimiters=['='], interpolation=None)
    settings.read(get_config().config_file, encoding='utf-8')
    found = {key.removesuffix('_requirements'): value for key, value in settings['DEFAULT'].items() if key.endswith('_requirements')}
    return {extra: [name.replace('-', '_') for name in re.findall(r'^[\w-]+', value, re.M)]
            for extra, value in found.items() if extra != 'dev'}


def used_extras(code):
    "Extra → what the code of a notebook imports of it."
    def imported(name): return re.search(rf"^\s*(?:from|import) {name}\b|'{name}'", code, re.M | re.I)
    used = {extra: [n for n in names if imported(n)] for extra, names in extras().items()}
    return {extra: names for extra, names in used.items() if names}


def beside(code):
    "What the code of a notebook reads beside the clone: files by their names, folders by their paths."
    def named(path): return path.rpartition('/')[2] in code if '.' in path else re.search(rf"shared/{path}(?!\w|/\w+\.(npz|json))", code)
    return [path for path in BESIDE if named(path)] if 'shared' in code else []


def link(name): return f'[{name}]({name}.ipynb)'


def stage_lines(stage):
    "What a stage reads and makes, as the runner knows it; lists of what failed are left out."
    def made(name): return ', '.join(f'`{file}`' for file in STAGES[name] if not file.startswith(('failed', 'odd')))
    before = '; '.join(f'{made(name)} of {link(name)}' for name in NEEDS[stage])
    return dict(Takes=f"where a run has them: {before}" if before else '', Gives=made(stage))


def builds_on(module):
    "Rooms whose names a module imports at its top."
    path, files = get_config().lib_path/f'{module}.py', sorted(get_config().nbs_path.glob('[0-9]*.ipynb'))
    if not path.exists(): return ''
    imports = [n for n in ast.parse(path.read_text(encoding='utf-8')).body if isinstance(n, ast.ImportFrom)]
    names = {n.module.removeprefix('hatemm_clip.') for n in imports if n.level or n.module.startswith('hatemm_clip.')}
    return ', '.join(link(f.stem) for f in files if f.stem.split('_', 1)[1] in names)


def needs(code):
    "What the cells without flags need; `make install` brings all extras but `vlm`."
    demo = ["the demo's run in `../runs/notebook`, which it makes where it is missing, in a few minutes"] * ('demo_run(' in code or 'demo_clips(' in code)
    used = [f"without a clone, `pip install 'hatemm_clip[{extra}]'` for {', '.join(f'`{n}`' for n in names)}"
            for extra, names in used_extras(code).items()]
    return '; '.join(['`make install`', *used, *demo]) if used or demo else 'nothing but `make install`'


def flagged(sources, name):
    "What the flagged cells need, how to run them, and what they read."
    flags = [cell_flag(s) for s in sources]
    counted = {flag: flags.count(flag) for flag in FLAGS if flag in flags}
    if not counted: return ''
    said = ', '.join(f"{count} need{'s' * (count == 1)} {FLAGS[flag]}" for flag, count in counted.items())
    flag = next(iter(counted))
    run = (f'*Run All* and tests leave them out and keep what they showed. To run them, put `%env HATEMM_CELLS={flag}` before them, '
           f'or use `HATEMM_CELLS={flag} python tools/prepare.py --run nbs/{name}.ipynb`')
    files = '; '.join(f'`../shared/{path}` ({BESIDE[path]})' for path in beside('\n'.join(s for s in sources if cell_flag(s))))
    return f'{said}. {run}.' + (f' Beside the clone, which does not bring it, they read {files}.' if files else '')


def box(sources, said, name, module):
    "The box of a notebook, as Markdown; sources: of its code cells; said: of `read_box`."
    derived = stage_lines(name) if name in STAGES else {}
    lines = {key: '; '.join(filter(None, [said.get(key), derived.get(key)])) for key in ('Takes', 'Gives')}
    left_out = flagged(sources, name)
    took = f"{said['Time']} to run all of it on two cores{', without flagged cells' * bool(left_out)}" if 'Time' in said else ''
    lines |= {'Needs': needs('\n'.join(sources)), 'Time': took, 'Flagged cells': left_out, 'Builds on': builds_on(module)}
    return '::: {.room}\n' + '\n'.join(f'- **{key}** {text}' for key, text in lines.items() if text) + '\n:::'


class add_box(Processor):
    "The box takes the place of the cell that holds its data."
    def begin(self):
        name = Path(self.nb.path_).stem
        if not re.match(r'\d|results_', name): return
        cells, links = read_nb(self.nb.path_).cells, NbdevLookup()
        said = {key: links.linkify(text) for key, text in read_box(cells).items()}
        made = box([c.source for c in cells if c.cell_type == 'code'], said, name, module_of(self.nb))
        kept = [c for c in self.nb.cells if not (c.cell_type == 'markdown' and is_box(c.source))]
        self.nb.cells = [kept[0], mk_cell(made, 'markdown'), *kept[1:]]
