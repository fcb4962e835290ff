"What runs again, what is kept, what is refused: notebooks that do next to nothing, in a project of their own."
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from hatemm_clip import keys, pipeline
from hatemm_clip.base import InputError
from hatemm_clip.keys import fingerprint
from hatemm_clip.pipeline import plan_run, run_pipeline
from hatemm_clip.results import read_log, recover
from hatemm_clip.stages import STAGES, missing_names, read_params, stage_cells, stage_parameters

PARAMETERS = "run_dir: str = ''\ndata_dir: str = ''\ndataset: str = 'hatemm'\nsplit: str = 'grouped'\nfold: str = '0'\nlr: float = 0.1\nbatch_size: int = 8\n"
ANNOTATION = 'video_file_name,label,hate_snippet,target\nhate_video_1.mp4,Hate,"[[\'00:00:00\', \'00:00:{}\']]",Others\n'


def write_stage(path, *stage, lessons=(), exported='', shown=''):
    "A stage notebook; each of its cells finds the path of its first result in `path`."
    first = STAGES[path.stem][0]
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    cells = [text('# A stage'), code(PARAMETERS, metadata=dict(tags=['parameters'])), code('import pathlib')]
    cells += [code('#| export\n' + exported)]*bool(exported) + [text('## A lesson'), *map(code, lessons), text('## The stage')]
    cells += [code(f'path = pathlib.Path(run_dir)/{first!r}'), *map(code, stage or ["path.write_text(f'{path.name} {batch_size}')"])]
    cells += [text('### What came out'), code(shown)]*bool(shown)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python'))), path)


def execute_here(notebook, page, parameters):
    "Run the cells of a stage in this process: what papermill does, without a kernel."
    nb, space = pipeline.stage_notebook(notebook), {}
    try:
        for cell in (c for c in nb.cells if c.cell_type == 'code'):
            exec(cell.source, space)
            if 'parameters' in cell.metadata.get('tags', []): space.update(parameters)
    except Exception as e: pipeline.refuse(f'{type(e).__name__}: {e}')
    finally: nbformat.write(nb, page)
    page.with_name('.given.json').write_text(json.dumps(parameters))
    given.update({page.stem: parameters})
    return ''


given = {}  # stage → parameters of its last run


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder with the notebooks of all stages and a params file; gives a function that runs it and says what ran."
    for folder in ('nbs/params', 'data/hate_videos', 'elsewhere'): (tmp_path/folder).mkdir(parents=True)
    for stage in STAGES: write_stage(tmp_path/f'nbs/{stage}.ipynb')
    (tmp_path/'data/HateMM_annotation.csv').write_text(ANNOTATION.format(10))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, '_execute', execute_here)

    def params(text='', stages='00_data, 10_asr, 20_embed'):
        (tmp_path/'nbs/params/p.yml').write_text(f'dataset: hatemm\ndata_dir: data\nstages: [{stages}]\n{text}')
        return 'nbs/params/p.yml'

    def run(text='', stages='00_data, 10_asr, 20_embed', **options):
        lines = []
        run_pipeline(params(text, stages), 'run', echo=lines.append, **options)
        return [line.split()[0] for line in lines if not re.search('up to date|brought back', line)]
    run.plan = lambda text='', stages='00_data, 10_asr, 20_embed', **options: {r['stage']: r['why'] for r in plan_run(params(text, stages), 'run', **options) if r['stale']}
    return run


def test_edited_spans_are_noticed(project, tmp_path):
    assert project() == ['00_data', '10_asr', '20_embed']
    assert project() == []
    (tmp_path/'data/HateMM_annotation.csv').write_text(ANNOTATION.format(20))  # as long as before
    assert project() == ['00_data']  # which makes the same table here
    assert project('20_embed: {batch_size: 4}\n') == ['20_embed']


def test_a_run_or_params_in_the_data_folder_make_nothing_stale(project, tmp_path):
    project()
    (tmp_path/'data/my.yml').write_text('seed: 1')
    shutil.copytree(tmp_path/'run', tmp_path/'data/run')
    assert project() == []
    (tmp_path/'data/hate_videos/hate_video_1.mp4').write_bytes(b'1')
    assert project.plan() == {'00_data': 'the files of data_dir changed', '10_asr': '00_data, which it needs, runs first', '20_embed': '00_data, which it needs, runs first'}


def test_lessons_and_figures_count_for_nothing_and_do_not_run(project, tmp_path):
    project()
    first = lambda *stage, **more: write_stage(tmp_path/'nbs/00_data.ipynb', *stage, **more)
    first(lessons=['raise ValueError'])
    assert project() == []
    first(shown='print(1)')
    assert project() == []
    assert project(only='00_data') == ['00_data'] and 'print(1)' in (tmp_path/'run/00_data.ipynb').read_text()
    first(exported='def new(): pass  # which nothing uses')
    assert project() == []
    first("path.write_text('other')")
    assert project() == ['00_data', '10_asr', '20_embed']


def test_a_stage_takes_from_its_lessons_what_it_needs(project, tmp_path):
    write_stage(tmp_path/'nbs/00_data.ipynb', 'path.write_text(words)', lessons=['words = "from above"', 'raise ValueError'])
    project(stages='00_data')
    assert (tmp_path/'run/clips.parquet').read_text() == 'from above'


def test_other_results_make_later_stages_stale(project):
    project()
    assert project('00_data: {batch_size: 2}\n', only='20_embed') == ['20_embed']  # of the tables that are there
    assert project('00_data: {batch_size: 2}\n') == ['00_data', '10_asr', '20_embed']
    assert project('00_data: {batch_size: 2}\n') == []


def test_a_lost_result_is_made_again(project, tmp_path):
    write_stage(tmp_path/'nbs/00_data.ipynb', "path.write_text('clips')", "path.with_name('splits.parquet').write_text('folds')")
    project(stages='00_data')
    assert project(stages='00_data') == []
    (tmp_path/'run/splits.parquet').unlink()
    assert project.plan(stages='00_data') == {'00_data': 'splits.parquet is gone'}
    assert project(stages='00_data') == ['00_data']
    assert (tmp_path/'run/splits.parquet').exists()


def test_a_stage_may_be_started_from_that_the_file_does_not_name(project):
    project()
    assert project('30_finetune: {fold: 1, lr: 2e-4}\n', start='30_finetune') == ['30_finetune']
    assert project(start='10_asr') == ['10_asr', '20_embed']


def test_values_reach_the_notebook_in_its_own_types(project, tmp_path):
    project('30_finetune: {fold: 0, lr: 2e-4}\n', only='30_finetune')
    assert {n: v for n, v in given['30_finetune'].items() if n in ('fold', 'lr')} == dict(fold='0', lr=.0002)
    with pytest.raises(InputError, match="expected an int, such as 8"): project('batch_size: many\n')


@pytest.mark.parametrize('place', ['.', 'nbs/params'])
def test_files_are_found_from_the_caller_and_beside_the_params(project, tmp_path, place):
    (tmp_path/place/'my.json').write_text('{"a": 1}')
    project('00_data: {split: my.json}\n')
    assert given['00_data']['split'] == str(tmp_path/place/'my.json') and given['00_data']['data_dir'] == str(tmp_path/'data')
    assert project('00_data: {split: my.json}\n') == []
    (tmp_path/place/'my.json').write_text('{"a": 2}')
    assert project('00_data: {split: my.json}\n') == ['00_data']


def test_a_stage_sees_what_it_needs_and_no_more(project, tmp_path):
    write_stage(tmp_path/'nbs/20_embed.ipynb', 'path.write_text(" ".join(sorted(p.name for p in path.parent.glob("*.parquet"))))')
    project(stages='00_data, 10_asr, 20_embed, 40_fusion')
    project('lr: 0.2\n', stages='00_data, 10_asr, 20_embed, 40_fusion')
    assert (tmp_path/'run/features.lance').read_text() == 'clips.parquet transcripts.parquet'


def test_a_failure_leaves_the_old_results(project, tmp_path):
    project()
    before = {p.name: p.read_bytes() for p in (tmp_path/'run').iterdir() if p.is_file() and p.name[0] != '.' and p.name != 'run.json'}
    write_stage(tmp_path/'nbs/10_asr.ipynb', "path.write_text('half')", "raise OSError('no such model')")
    with pytest.raises(InputError, match=r'10_asr failed: OSError: no such model; see .*10_asr.failed.ipynb'): project()
    assert {n: (tmp_path/'run'/n).read_bytes() for n in before} == before
    write_stage(tmp_path/'nbs/10_asr.ipynb')
    assert project() == []  # as before the change
    assert not project.plan()


def test_going_back_finds_the_old_result(project, tmp_path):
    project()
    assert project('10_asr: {batch_size: 4}\n') == ['10_asr', '20_embed']
    assert project.plan() == {'10_asr': 'parameter batch_size changed from 4 to 8', '20_embed': '10_asr, which it needs, runs first'}
    assert project() == []
    assert (tmp_path/'run/transcripts.parquet').read_text() == 'transcripts.parquet 8'
    assert project('10_asr: {batch_size: 4}\n') == []
    assert project('10_asr: {batch_size: 2}\n') == ['10_asr', '20_embed']
    assert project() == ['10_asr', '20_embed']  # two results of a stage are kept, not three


def test_rows_are_kept_where_only_inputs_are_others(project, tmp_path):
    rows = "found = path.read_text().split() if path.exists() else []\npath.write_text(' '.join([*found, str(len(found))]))"
    write_stage(tmp_path/'nbs/10_asr.ipynb', rows)
    table = lambda: (tmp_path/'run/transcripts.parquet').read_text()
    project()
    assert table() == '0'
    project('00_data: {batch_size: 2}\n')
    assert table() == '0 1'  # other inputs: it went on
    project('00_data: {batch_size: 2}\n', only='10_asr')
    assert table() == '0'  # asked for
    project('00_data: {batch_size: 2}\n10_asr: {lr: 0.2}\n')
    assert table() == '0'  # another make of rows


def test_the_old_page_stays_while_rows_go_on(project, tmp_path):
    write_stage(tmp_path/'nbs/10_asr.ipynb', "path.write_text('rows')")
    project()
    old = (tmp_path/'run/10_asr.ipynb').read_bytes()
    write_stage(tmp_path/'nbs/00_data.ipynb', "path.write_text('others')")
    project()
    assert (tmp_path/'run/.previous/10_asr/10_asr.ipynb').read_bytes() == old
    assert not (tmp_path/'run/.previous/10_asr/10_asr.ipynb').samefile(tmp_path/'run/10_asr.ipynb')


def test_what_was_half_made_goes_on(project, tmp_path):
    rows = "done = path.with_suffix('.journal')\nbefore = done.read_text() if done.exists() else ''\ndone.write_text(before + 'row ')"
    stop = "import os\nif not os.path.exists('go'): raise OSError('killed')\npath.write_text(done.read_text())\ndone.unlink()"
    write_stage(tmp_path/'nbs/10_asr.ipynb', rows, stop)
    for _ in range(2):
        with pytest.raises(InputError, match='killed'): project()
    (tmp_path/'go').touch()
    assert project() == ['10_asr', '20_embed']
    assert (tmp_path/'run/transcripts.parquet').read_text() == 'row row row '


SLOW = "import time\nfor i in range(20):\n    with open(path, 'a') as f: f.write(f'{batch_size} ')\n    time.sleep(1. if batch_size == 10 else .01)"
def test_files_that_failed_are_tried_again_when_asked(project, tmp_path):
    "A second run leaves them alone; with `retry` their stages run, and keep the rows that are good."
    tried = "with open(path.parents[2]/'tried', 'a') as f: f.write('x')"
    write_stage(tmp_path/'nbs/10_asr.ipynb', "path.write_text('rows')", tried, "path.with_name('failed_transcripts.csv').write_text('clip_id,error')")
    lines = lambda **options: project(stages='00_data, 10_asr', **options)
    assert lines() == ['00_data', '10_asr'] and lines() == [] and (tmp_path/'run/tried').read_text() == 'x'
    assert project.plan(stages='00_data, 10_asr', retry=True) == {'10_asr': 'files that failed are tried again'}
    write_stage(tmp_path/'nbs/10_asr.ipynb', "path.write_text('rows')", tried)
    lines()
    assert lines(retry=True) == []  # nothing has failed

BUNDLE = "folder = path.with_name('bundle')\nfolder.mkdir(exist_ok=True)\nfor name in ('config.json', 'model.bin'): (folder/name).write_text(str(batch_size))"


def whole_result(out):
    "The batch size that a result was made with; it must be one."
    written = {*(out/'predictions.parquet').read_text().split(), *(p.read_text() for p in (out/'bundle').iterdir())}
    assert len(written) == 1 and len((out/'predictions.parquet').read_text().split()) == 20, written
    return int(written.pop())


def wait_until(ready, limit=120):
    began = time.monotonic()
    while not ready():
        assert time.monotonic() - began < limit
        time.sleep(.001)


def start_child(work):
    "Fork a process that does some work."
    child = os.fork()
    if child: return child
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
    try: work()
    except BaseException: os._exit(1)
    os._exit(0)


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_killed_at_ten_moments(project, tmp_path, how):
    write_stage(tmp_path/'nbs/40_fusion.ipynb', 'path.write_text("")', SLOW, BUNDLE)
    make = lambda size: project(f'40_fusion: {{batch_size: {size}}}\n', stages='00_data, 10_asr, 20_embed, 40_fusion')
    key = lambda: json.loads((tmp_path/'run/run.json').read_text())['stages']['40_fusion']['key']
    make(8)
    began = time.perf_counter()
    make(9)
    seconds, seen, draw = time.perf_counter() - began, [9], random.Random(0)
    for turn in range(10):
        size, before = 10 + turn, key()
        child = start_child(lambda: make(size))
        if turn < 9: time.sleep(seconds*(turn + draw.random())/7)  # from the beginning to past the usual end
        else: wait_until(lambda: key() != before)  # the new result is just in its place
        os.kill(child, how)
        os.waitpid(child, 0)
        recover(tmp_path/'run', read_log(tmp_path/'run'))  # as the next run begins
        seen.append(whole_result(tmp_path/'run'))
        assert seen[-1] in (size, seen[-2])
    assert len(set(seen)) < len(seen) and seen[-1] == 19  # some were killed before their end
    make(99)
    assert whole_result(tmp_path/'run') == 99


def test_precision_is_decided_once(project, monkeypatch):
    asked = dict(encoder='ViT-B-32', pretrained='openai', device='cpu', precision='auto')
    log = dict(decided=dict(precision=dict(value='bfloat16', of={n: asked[n] for n in ('encoder', 'pretrained', 'device')})))
    assert pipeline.decided('20_embed', asked, log) == dict(precision='bfloat16')
    assert pipeline.decided('20_embed', dict(asked, precision='float32'), log) == pipeline.decided('30_finetune', asked, log) == {}


REFUSED = {
    'dataset: hatem\n': "data set 'hatem' is unknown", '00_data: {split: mine.json}\n': 'split: mine.json: no such file',
    '00_data: {split: published}\n': 'hatemm comes without one', 'data_dir: nowhere\n': 'no such folder'}


@pytest.mark.parametrize('text', REFUSED)
def test_refused_at_the_start(project, tmp_path, text):
    with pytest.raises(InputError, match=REFUSED[text]): project(re.sub(r'^dataset: hatemm\n', '', text))
    assert not (tmp_path/'run').exists() and not given.get('never')


def test_columns_are_looked_at_before_anything_runs(project, tmp_path):
    project()
    (tmp_path/'data/HateMM_annotation.csv').write_text('video_file_name,label\nx.mp4,Hate\n')
    given.clear()
    with pytest.raises(InputError, match='lacks the columns hate_snippet, target'): project()
    assert not given and (tmp_path/'run/clips.parquet').exists()


def test_fine_tuning_that_is_asked_for_must_be_made(tmp_path):
    file = tmp_path/'p.yml'
    def plan(text):
        file.write_text(text)
        return plan_run(file, tmp_path/'run')
    stages = 'stages: [00_data, 10_asr, 20_embed, 30_finetune, 40_fusion]\n40_fusion: {finetuned: lora}\n'
    with pytest.raises(InputError, match='30_finetune, which makes it, is left out'): plan('40_fusion: {finetuned: lora}\n')
    with pytest.raises(InputError, match="30_finetune makes 'projection'"): plan(stages)
    with pytest.raises(InputError, match='needs an encoder a fold'): plan(stages + '30_finetune: {mode: lora, fold: 0}\n')
    with pytest.raises(InputError, match="fold 'all,single'"): plan(stages + '30_finetune: {mode: lora}\n')
    assert len(plan(stages + "30_finetune: {mode: lora, fold: 'all,single'}\n")) == 5


def test_weights_are_looked_for_at_the_start(tmp_path, monkeypatch):
    from hatemm_clip.speech import find_openai_model
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr('socket.getaddrinfo', lambda *_, **__: (_ for _ in ()).throw(OSError('no network')))
    with pytest.raises(InputError, match="'base' is not on this machine"): pipeline.check_run({'10_asr': dict(model='base', backend='auto')}, ['10_asr'], tmp_path)
    with pytest.raises(InputError, match='ViT-B-32/openai is not on this machine'): pipeline.check_run({'20_embed': dict(encoder='ViT-B-32', pretrained='openai')}, ['20_embed'], tmp_path)
    with pytest.raises(InputError, match='neither a .pt file nor a size'): find_openai_model('bas', False)
    pipeline.check_run({'10_asr': dict(model='tiny.en')}, ['10_asr'], tmp_path)


def test_fingerprint_of_large_files(tmp_path):
    file, content = tmp_path/'weights.bin', bytearray(3 << 20)
    def after(at):
        content[at] ^= 1
        file.write_bytes(content)
        return fingerprint(file)
    first = after(0)
    assert after(-1) != first and after(-1) == first and after(0) != first
    assert len({fingerprint(Path(__file__)), fingerprint(Path(__file__).parent), first}) == 3


def test_params_of_hatemm_with_words_in_pictures(tmp_path):
    head, commented = (ROOT/'nbs/params/hatemm.yml').read_text().split('# With the words in the pictures')
    lines = commented.split('# With fine-tuning')[0].splitlines()[1:]
    (tmp_path/'p.yml').write_text(head + '\n'.join(line.removeprefix('# ') for line in lines))
    params = read_params(tmp_path/'p.yml', ROOT/'nbs')
    assert list(params) == [stage for stage in STAGES if stage not in ('70_memes', '30_finetune')] and 'batch_size' not in params['12_ocr']
    assert params['12_ocr']['fps'] == .5 and params['20_embed']['fps'] == 1. and params['40_fusion']['modalities'] == 'image+text+ocr'


def test_params_of_hatemm_with_fine_tuning(tmp_path):
    text = (ROOT/'nbs/params/hatemm.yml').read_text()
    usual = read_params(ROOT/'nbs/params/hatemm.yml', ROOT/'nbs', '30_finetune')
    assert usual['20_embed']['batch_size'] == 64 and 'batch_size' not in usual['30_finetune']  # a frame is less than a clip
    head, commented = text.split('# With fine-tuning')
    (tmp_path/'p.yml').write_text(head + '\n'.join(line.removeprefix('# ') for line in commented.splitlines()[1:]))
    tuned = read_params(tmp_path/'p.yml', ROOT/'nbs')
    assert list(tuned) == [stage for stage in STAGES if stage not in ('70_memes', '12_ocr')] and tuned['30_finetune']['batch_size'] == 32 and tuned['40_fusion']['finetuned'] == 'lora'


@pytest.fixture
def sources(tmp_path, monkeypatch):
    "The real notebooks and modules, copied, and a run of them of which the results are made up; gives what is stale after an edit."
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    shutil.copytree(ROOT/'hatemm_clip', tmp_path/'package', ignore=shutil.ignore_patterns('__pycache__', 'assets'))
    for module in (keys, pipeline): monkeypatch.setattr(module, 'package_dir', lambda: tmp_path/'package')

    def made_up(notebook, page, parameters):
        (page.parent/STAGES[notebook.stem][0]).write_text('rows')
        page.write_text('{}')
        return ''
    monkeypatch.setattr(pipeline, '_execute', made_up)
    run_pipeline(tmp_path/'nbs/params/demo.yml', tmp_path/'run', echo=lambda line: None)
    return tmp_path, lambda: [r['stage'] for r in plan_run(tmp_path/'nbs/params/demo.yml', tmp_path/'run') if r['stale']]


def edit_cell(path, is_wanted, change):
    "Change the first cell of a notebook that is wanted."
    nb = json.loads(path.read_text())
    cell = next(c for i, c in enumerate(nb['cells']) if c['cell_type'] == 'code' and is_wanted(i, ''.join(c['source'])))
    cell['source'] = change(''.join(cell['source']))
    path.write_text(json.dumps(nb))


def test_which_edits_of_the_project_make_stages_stale(sources):
    folder, stale = sources
    assert stale() == []
    edit_cell(folder/'nbs/02_fetch.ipynb', lambda i, s: '| export' in s, lambda s: s + '\n# a comment')
    for file in (folder/'package').glob('*.py'): file.write_text(file.read_text().replace('\n\n\n', '\n# a comment\n\n\n') + '# the end\n')
    assert stale() == []
    ran = {c['place'] for c in stage_cells(folder/'nbs/10_asr.ipynb')}
    edit_cell(folder/'nbs/10_asr.ipynb', lambda i, s: i not in ran, lambda s: s + '\nprint("another lesson")')
    assert stale() == []
    changed = lambda s: s.replace('"Load a speech recogniser."', '"Load a speech recogniser."\n    threads = threads or 1')
    for file in (folder/'nbs').glob('[01]*.ipynb'):
        if '"Load a speech recogniser.' in json.dumps([''.join(c['source']) for c in json.loads(file.read_text())['cells']]).replace('\\"', '"'):
            edit_cell(file, lambda i, s: '"Load a speech recogniser."' in s, changed)
    for file in (folder/'package').glob('*.py'): file.write_text(changed(file.read_text()))
    assert stale() == ['10_asr', '20_embed', '40_fusion', '50_robust', '60_analysis']
    why = {r['stage']: r['why'] for r in plan_run(folder/'nbs/params/demo.yml', folder/'run')}
    assert re.fullmatch(r'code of \w+\.load_asr changed', why['10_asr'])


@pytest.mark.parametrize('stage', STAGES)
def test_every_stage_runs_without_what_only_lessons_import(stage):
    "Stages run from an installed wheel, where the packages for development are not."
    imported = [line for c in stage_cells(ROOT/f'nbs/{stage}.ipynb') if c['type'] == 'code' for line in re.findall(r'^ *(?:from|import) +(\w+)', c['source'], re.MULTILINE)]
    assert not {'fastcore', 'nbdev', 'pytest'} & set(imported)
    assert missing_names(ROOT/f'nbs/{stage}.ipynb') == []
    assert 'run_dir' in stage_parameters(ROOT/f'nbs/{stage}.ipynb')
