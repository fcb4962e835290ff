"Which stages run again: notebooks that do next to nothing, in a project of their own."
import json
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from hatemm_clip.base import InputError
from hatemm_clip.pipeline import STAGES, fingerprint, read_params, run_pipeline, stage_parameters

PARAMETERS = "run_dir: str = ''\ndata_dir: str = ''\ndataset: str = 'hatemm'\nsplit: str = 'grouped'\nfold: str = '0'\nlr: float = 0.1\nbatch_size: int = 8\n"


def write_notebook(path, first, more=''):
    "A stage: it writes its first output, with the code cells `more` around."
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata=dict(tags=['parameters']))]
    cells.append(nbformat.v4.new_code_cell(f"import pathlib\npath = pathlib.Path(run_dir)/{first!r}\npath.write_text(f'{{path.name}} {{batch_size}}')"))
    cells += [nbformat.v4.new_code_cell(source) for source in more.split('---') if source]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python'))), path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder with the notebooks of all stages and a params file; gives a function that runs it and tells what ran."
    for folder in ('nbs/params', 'data', 'elsewhere'): (tmp_path/folder).mkdir(parents=True)
    for stage, (first, *_) in STAGES.items(): write_notebook(tmp_path/f'nbs/{stage}.ipynb', first)
    (tmp_path/'data/HateMM_annotation.csv').write_text('a,0:10')
    monkeypatch.chdir(tmp_path)

    def run(text='', stages='00_data, 10_asr, 20_embed', **options):
        (tmp_path/'nbs/params/p.yml').write_text(f'dataset: hatemm\ndata_dir: data\nstages: [{stages}]\n{text}')
        lines = []
        run_pipeline('nbs/params/p.yml', 'run', echo=lines.append, **options)
        return [line.split()[0] for line in lines if 'up to date' not in line]
    return run


def executed(tmp_path, stage): return {s.split(' = ')[0]: s.split(' = ')[1] for s in _injected(tmp_path/f'run/{stage}.ipynb').splitlines() if ' = ' in s}


def _injected(path): return next(c.source for c in nbformat.read(path, 4).cells if 'injected-parameters' in c.metadata.get('tags', []))


def test_edited_spans_are_noticed(project, tmp_path):
    assert project() == ['00_data', '10_asr', '20_embed']
    assert project() == []
    (tmp_path/'data/HateMM_annotation.csv').write_text('a,0:20')  # as long as before
    assert project() == ['00_data']  # which makes the same table here
    assert project('20_embed: {batch_size: 4}\n') == ['20_embed']


def test_lessons_of_earlier_notebooks_do_not_count(project, tmp_path):
    project()
    first = lambda more: write_notebook(tmp_path/'nbs/00_data.ipynb', 'clips.parquet', more)
    first('assert 1 + 1 == 2')
    assert project() == ['00_data']
    first("assert 1 + 1 == 2---#| slow\nraise ValueError")
    assert project() == []
    first("assert 1 + 1 == 2---#| export\ndef new(): pass")
    assert project() == ['00_data', '10_asr', '20_embed']


def test_other_outputs_make_later_stages_stale(project):
    project()
    assert project('00_data: {batch_size: 2}\n', only='20_embed') == ['20_embed']  # of the tables that are there
    assert project('00_data: {batch_size: 2}\n') == ['00_data', '10_asr', '20_embed']
    assert project('00_data: {batch_size: 2}\n') == []


def test_a_lost_output_is_made_again(project, tmp_path):
    write_notebook(tmp_path/'nbs/00_data.ipynb', 'clips.parquet', "path.with_name('splits.parquet').write_text('folds')")
    project(stages='00_data')
    assert project(stages='00_data') == []
    (tmp_path/'run/splits.parquet').unlink()
    assert project(stages='00_data') == ['00_data']
    assert (tmp_path/'run/splits.parquet').exists()


def test_a_stage_may_be_started_from_that_the_file_does_not_name(project):
    project()
    assert project('30_finetune: {fold: 1, lr: 2e-4}\n', start='30_finetune') == ['30_finetune']
    assert project(start='10_asr') == ['10_asr', '20_embed']


def test_values_reach_the_notebook_in_its_own_types(project, tmp_path):
    project('30_finetune: {fold: 0, lr: 2e-4}\n', only='30_finetune')
    assert {n: v for n, v in executed(tmp_path, '30_finetune').items() if n in ('fold', 'lr')} == dict(fold='"0"', lr='0.0002')
    with pytest.raises(InputError, match="expected an int, such as 8"): project('batch_size: many\n')


@pytest.mark.parametrize('place', ['.', 'nbs/params'])
def test_files_are_found_from_the_caller_and_beside_the_params(project, tmp_path, place):
    (tmp_path/place/'my.json').write_text('{"a": 1}')
    project('00_data: {split: my.json}\n')
    assert executed(tmp_path, '00_data')['split'] == json.dumps(str(tmp_path/place/'my.json'))
    assert executed(tmp_path, '00_data')['data_dir'] == json.dumps(str(tmp_path/'data'))
    assert project('00_data: {split: my.json}\n') == []
    (tmp_path/place/'my.json').write_text('{"a": 2}')
    assert project('00_data: {split: my.json}\n') == ['00_data']


def test_fingerprint_of_large_files(tmp_path):
    file, content = tmp_path/'weights.bin', bytearray(3 << 20)
    def after(at):
        content[at] ^= 1
        file.write_bytes(content)
        return fingerprint(file)
    first = after(0)
    assert after(-1) != first and after(-1) == first and after(0) != first
    assert len({fingerprint(Path(__file__)), fingerprint(Path(__file__).parent), first}) == 3


def test_params_of_hatemm_with_fine_tuning(tmp_path):
    text = (ROOT/'nbs/params/hatemm.yml').read_text()
    usual = read_params(ROOT/'nbs/params/hatemm.yml', ROOT/'nbs', '30_finetune')
    assert usual['20_embed']['batch_size'] == 64 and 'batch_size' not in usual['30_finetune']  # a frame is less than a clip
    if 'finetuned' not in stage_parameters(ROOT/'nbs/40_fusion.ipynb'): pytest.skip('40_fusion takes no features of a fine-tuning yet')
    head, commented = text.split('# With fine-tuning')
    (tmp_path/'p.yml').write_text(head + '\n'.join(line.removeprefix('# ') for line in commented.splitlines()[1:]))
    tuned = read_params(tmp_path/'p.yml', ROOT/'nbs')
    assert list(tuned) == list(STAGES) and tuned['30_finetune']['batch_size'] == 32 and tuned['40_fusion']['finetuned'] == 'lora'


def test_rows_are_kept_where_only_inputs_are_others(tmp_path, monkeypatch):
    from hatemm_clip import pipeline
    seen, table, log = [], tmp_path/'transcripts.parquet', dict(stages={})

    def stage(*_):
        seen.append(table.exists())
        table.write_text('rows')
        return 'done'
    monkeypatch.setattr(pipeline, '_execute', stage)
    for key, own in (('a', 'x'), ('b', 'x'), ('b', 'x'), ('c', 'y')): pipeline._run_stage('10_asr', key, own, {}, tmp_path, tmp_path, log, lambda line: None)
    assert seen == [False, True, False, False]  # new, other inputs, forced, other code
    code = {name: ['#| export\nx = 1'] for name in pipeline.STAGES}
    keys = lambda **params: {s: pipeline.own_key(s, params, code) for s in pipeline.STAGES}
    assert keys()['40_fusion'] is None and keys(**{'00_data': dict(seed=1)}) == keys()
    other = keys(**{'10_asr': dict(beam_size=1)})
    assert other['10_asr'] != keys()['10_asr'] and other['20_embed'] != keys()['20_embed']
