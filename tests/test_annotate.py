"Re-annotation: a model behind every kind of server, killed runs, votes of people, the page without a browser, bad input."
import json
import os
import signal
import sys
import time

import pandas as pd
import pytest
import warm
from answering import cut, FakeModel, malformed, slow, status
from conftest import ROOT
from killing import kill_runs

from hatemm_clip.annotate import annotate, AnnotationQueue, past_votes
from hatemm_clip.ask import Prompt
from hatemm_clip.base import InputError, store_lock
from hatemm_clip.cli import main
from hatemm_clip.memes import make_memes, read_definition, read_memes
from hatemm_clip.models import ask_all, Endpoint, Journal, Patience, Spending
from hatemm_clip.reannotate import reannotate, ReannotateSettings
from hatemm_clip.votes import append_vote, join_votes, read_votes

HATS = read_definition('hatemm')
QUICK = Patience(timeout=1., tries=3, backoff=.01)  # a slow answer takes 3 s


def some_items(n): return pd.DataFrame(dict(video_id=[f'{i:03d}' for i in range(n)], text=[f'The blue hats sang {i} songs.' for i in range(n)], path=''))


def ask(model, items, journal, patience=QUICK, **spending): return ask_all(Prompt(HATS), items, Endpoint(model.url, 'fake', patience=patience), journal, Spending(**spending))


@pytest.fixture
def table(tmp_path):
    "Forty invented memes without anything but their own labels."
    path = make_memes(tmp_path/'memes', 40)
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    rows.drop(columns=['model_prediction', 'human_annotation', 'majority_voting']).to_csv(path.with_name('plain.csv'), index=False)
    return path.with_name('plain.csv')


FAULTS = dict(slow=slow, malformed=malformed, cut=cut, broken=status(500), busy=status(429, Retry_After='0.1'), closed=status(503))


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_that_passes_costs_one_more_request(name, tmp_path):
    with FakeModel(lambda text, times: FAULTS[name] if times == 1 else 'hateful') as model:
        found = ask(model, some_items(3), tmp_path/'answers.jsonl')
        assert (found.label == 1).all() and len(model.asked) == 6


@pytest.mark.parametrize('name,reason', dict(malformed='not an answer in the form', broken='answered 500', closed='answered 503').items())
def test_a_fault_that_stays_costs_the_item_and_is_asked_again(name, reason, tmp_path):
    with FakeModel(lambda text, times: FAULTS[name] if ' 1 ' in text and times <= 3 else 'hateful') as model:
        found = ask(model, some_items(3), tmp_path/'answers.jsonl')
        assert found.label.fillna(-1).tolist() == [1, -1, 1] and reason in found.reason[1]
        assert ask(model, some_items(3), tmp_path/'answers.jsonl').label.tolist() == [1, 1, 1] and len(model.asked) == 6


def test_a_busy_server_is_left_alone_for_as_long_as_it_says(tmp_path):
    with FakeModel(lambda text, times: status(429, Retry_After='1') if times == 1 else 'hateful') as model:
        ask(model, some_items(1), tmp_path/'answers.jsonl')
        assert model.arrived[1] - model.arrived[0] >= 1
    with FakeModel(lambda text, times: status(429, 'quota', Retry_After='86400')) as model:
        with pytest.raises(InputError, match='asks to be left alone for 86400 s'): ask(model, some_items(1), tmp_path/'more.jsonl')
        assert len(model.asked) == 1


def test_requests_a_minute_are_kept(tmp_path):
    with FakeModel() as model:
        ask(model, some_items(5), tmp_path/'answers.jsonl', Patience(rate=300), jobs=4)
        assert model.arrived[-1] - model.arrived[0] >= .75


def test_what_was_answered_and_is_none_keeps_its_words(tmp_path):
    said = ["I'm sorry, I cannot discuss hateful posts.", 'A man in a hat.', '', 'hateful or non-hateful']
    with FakeModel(lambda text, times: said[int(text.split()[4])]) as model:
        found = ask(model, some_items(4), tmp_path/'answers.jsonl')
        assert found.answer.tolist() == said and found.label.isna().all()
        assert found.reason.tolist() == ['the model refused', 'the answer names neither label', 'the answer is empty', 'the answer names both labels']
        ask(model, some_items(4), tmp_path/'answers.jsonl')
        assert len(model.asked) == 4, 'an answer is an answer: it is not asked for again'


def test_killed_runs_lose_and_repeat_nothing(tmp_path):
    journal, items, repeated = tmp_path/'answers.jsonl', some_items(120), []

    def answer(text, times):
        if text in written_texts(): repeated.append(text)
        return 'hateful'

    def written_texts():
        names = [json.loads(line)['id'] for line in journal.read_text().splitlines() if line.endswith('}')] if journal.exists() else []
        return {f'The blue hats sang {int(name)} songs.' for name in names}

    with FakeModel(answer, delay=.05) as model:
        killed = kill_runs(lambda ready: (ready(), ask(model, items, journal, jobs=3)), times=6, longest=.6)
        before = len(Journal(journal).rows)
        assert killed == 6 and 0 < before < 120
        found = ask(model, items, journal, jobs=3)
        assert (found.label == 1).all() and not repeated
        assert len(journal.read_text().splitlines()) == 120
        assert 120 <= len(model.asked) <= 120 + 6*3, 'only what was under way when a run was killed is asked twice'


def test_a_budget_is_not_exceeded_by_questions_under_way(tmp_path):
    with FakeModel(delay=.02) as model:
        found = ask(model, some_items(40), tmp_path/'answers.jsonl', jobs=6, price_in=1., price_out=0., budget=.0105)
        assert found.label.notna().sum() == len(model.asked) == 10  # .001 each
        assert ask(model, some_items(40), tmp_path/'answers.jsonl', jobs=6).label.notna().all() and len(model.asked) == 40


def test_what_a_budget_leaves_waits_for_the_model_and_not_for_people(table, tmp_path):
    with FakeModel() as model:
        settings = ReannotateSettings(spending=Spending(jobs=2, price_in=1., budget=.0205))
        figures = reannotate(table, 'hatemm', tmp_path/'out', Endpoint(model.url, 'fake', patience=QUICK), settings=settings)
    assert figures['asked']['answered'] == 20 and figures['asked']['not_asked'] == 20 and not figures['asked']['failed']
    assert figures['agree'] + figures['to_people'] == 20 and not (tmp_path/'out/failed.csv').exists()


def test_a_model_that_answers_nothing_ends_with_a_status(table, hatemm, tmp_path):
    with FakeModel(lambda text, times: 'A man in a hat.') as model:
        done = hatemm('reannotate', table, '--definition', 'hatemm', '--out', tmp_path/'out', '--endpoint', model.url, '--model', 'm')
    assert done.returncode == 1 and '0 answers, 40 failed' in done.stdout and not done.stderr


def test_ctrl_c_keeps_what_was_answered(table, tmp_path):
    with FakeModel(delay=.3) as model:
        command = [sys.executable, '-m', 'hatemm_clip', 'reannotate', table, '--definition', 'hatemm', '--out', tmp_path/'out', '--endpoint', model.url, '--model', 'm', '--jobs', '2']
        run = warm.Fork(command, cwd=ROOT)
        while len(model.asked) < 5: time.sleep(.05)
        run.send_signal(signal.SIGINT)
        told = run.communicate(timeout=60)[1]
        asked = len(model.asked)
    assert run.returncode == 130 and told == 'stopped; what was answered is kept, run again to go on\n'
    assert len(Journal(tmp_path/'out/answers.jsonl').rows) == asked, 'those under way are awaited'


def test_two_runs_on_one_folder_are_refused(tmp_path):
    with store_lock(tmp_path/'answers.jsonl'), FakeModel() as model:
        with pytest.raises(InputError, match='another run is writing'): ask(model, some_items(1), tmp_path/'answers.jsonl')
        assert not model.asked


def test_the_command_from_labels_to_a_table(table, hatemm, tmp_path):
    out, answers = tmp_path/'out', dict(zip(read_memes(table).text, read_memes(table.with_name('memes.csv')).model))
    args = 'reannotate', table, '--definition', 'hatemm', '--out', out, '--json', tmp_path/'figures.json'
    with FakeModel(lambda text, times: HATS.labels[int(answers.get(text, 0))].title() + '.') as model:
        done = hatemm(*args, '--endpoint', model.url, '--model', 'fake', '--jobs', 2)
        assert done.returncode == 0 and not done.stderr, done.stderr
        asked = len(model.asked)
        sheet = pd.read_csv(out/'to_annotate.csv', dtype=str, keep_default_na=False)
        figures = json.loads((tmp_path/'figures.json').read_text())
        assert len(sheet) == figures['to_people'] == figures['open'] > 5 and figures['agree'] + figures['to_people'] == 40
        sheet.assign(label='hateful').to_csv(tmp_path/'anna.csv', index=False)
        sheet[1:].assign(label='0').to_csv(tmp_path/'ben.csv', index=False)
        tasks = json.loads((out/'label_studio.json').read_text())
        result = [dict(type='choices', from_name='label', to_name='text', value=dict(choices=['hateful']))]
        for task in tasks:
            if task['data']['item_id'] not in set(sheet.id[:2]): task['annotations'] = [dict(completed_by=7, result=result, created_at='2026-11-27')]
        (tmp_path/'export.json').write_text(json.dumps(tasks))
        done = hatemm(*args, '--endpoint', model.url, '--model', 'fake', '--votes', tmp_path/'anna.csv', '--votes', tmp_path/'ben.csv', '--label-studio', tmp_path/'export.json')
        assert done.returncode == 0, done.stderr
        assert len(model.asked) == asked, 'a second run asks nothing'
    figures = json.loads((tmp_path/'figures.json').read_text())
    assert (figures['open'], figures['ties'], figures['decided']) == (1, 1, 39)  # Anna and Ben on the second item
    assert set(figures['agreement']['bias']) == {'anna', 'ben', 'annotator 7'} and len(figures['agreement']['pairs']) == 3
    aligned = read_memes(out/'aligned.csv', 'majority', 'hatemm')
    assert len(aligned) == 39 and all(os.path.isfile(p) for p in aligned.path)
    assert len(pd.read_csv(out/'votes.csv')) == 3*len(sheet) - 3
    again = hatemm('reannotate', out/'aligned.csv', '--definition', 'hatemm')
    assert 'equal to that of the file on 40 of 40' in again.stdout
    sheet.assign(label='hateful').to_csv(out/'to_annotate.csv', index=False)
    refused = hatemm(*args, '--answers', out/'answers.jsonl')
    assert refused.returncode == 2 and 'would be written over' in refused.stderr


def test_a_key_is_sent_and_written_nowhere(table, hatemm, tmp_path, monkeypatch):
    monkeypatch.setenv('MY_KEY', 'sk-very-secret')
    args = 'reannotate', table, '--definition', 'hatemm', '--out', tmp_path/'out', '--model', 'fake', '--key-from', 'MY_KEY', '--endpoint'
    with FakeModel() as model:
        done = hatemm(*args, model.url)
        assert done.returncode == 0 and model.keys == {'Bearer sk-very-secret'}
    with FakeModel(lambda text, times: status(401, 'wrong key sk-very-secret')) as model:
        refused = hatemm(*args, model.url, '--max-tokens', 65)
        assert refused.returncode == 2 and 'does not take the key in MY_KEY (401: wrong key ***)' in refused.stderr
    told = done.stdout + done.stderr + refused.stdout + refused.stderr + ''.join(f.read_text() for f in (tmp_path/'out').iterdir() if f.is_file())
    assert 'very-secret' not in told


def test_the_published_memes(shared, hatemm):
    done = hatemm('reannotate', shared/'data/memes/fhm_aligned_with_hatemm.csv', '--definition', 'hatemm', '--json', '-')
    figures = json.loads(done.stdout)
    assert (figures['recomputed'], figures['to_people'], figures['voted'], figures['ties']) == (3000, 1136, 1136, 0)


def test_the_published_examples(shared):
    from hatemm_clip.ask import choose_examples, read_examples
    examples = choose_examples(read_examples(shared/'data/memes/hatemm_demo_description.csv', HATS), 4)
    assert sorted(e.label for e in examples) == ['hateful', 'hateful', 'non-hateful', 'non-hateful'] and all(e.description for e in examples)


def write(path, *lines): path.write_text('\n'.join(lines) + '\n'); return path


def bad_inputs(folder, table):
    "Arguments by what is wrong, with what the one line must say."
    head, lines = 'id,image,text,label', ['1,a.png,The blue hats sang.,hateful', '2,b.png,Hello,non-hateful']
    write(folder/'strangers.csv', 'id,label', '0001,hateful', '77,hateful')
    write(folder/'odd_votes.csv', 'id,label', '0001,perhaps')
    write(folder/'short.yml', 'name: hats', 'labels: [kind, unkind]')
    write(folder/'answers.csv', 'id,answer', '0001,hateful', '0001,hateful')
    file = write(folder/'ok_answers.csv', 'id,answer', '0001,hateful')
    hats = '--definition', 'hatemm'
    return {
        'label outside the definition': ([write(folder/'label.csv', head, *lines, '3,c.png,Hi,perhaps'), *hats], "label.csv line 4: label is 'perhaps'"),
        'two rows of one id': ([write(folder/'twice.csv', head, *lines, lines[0]), *hats], 'twice.csv line 4'),
        'no model': ([table, *hats], 'has no column model_prediction, and no model is asked'),
        'unknown ids': ([table, *hats, '--answers', file, '--votes', folder/'strangers.csv'], "strangers.csv line 3: the id '77' is not among the 40 items"),
        'a vote for no label': ([table, *hats, '--answers', file, '--votes', folder/'odd_votes.csv'], "odd_votes.csv line 2: label is 'perhaps'"),
        'endpoint down': ([table, *hats, '--endpoint', 'http://127.0.0.1:9', '--model', 'm', '--tries', 1], 'nobody listens there (connection refused)'),
        'no key': ([table, *hats, '--endpoint', 'http://127.0.0.1:9', '--model', 'm', '--key-from', 'NO_SUCH_KEY'], '--key-from NO_SUCH_KEY: no such environment variable'),
        'definition without text': ([table, '--definition', folder/'short.yml', '--answers', file], 'short.yml: lacks text'),
        'two answers for one id': ([table, *hats, '--answers', folder/'answers.csv'], "line 3: the id '0001' is there twice"),
        'no such model': ([table, *hats, '--local', folder], 'no config.json'),
        'two ways to ask': ([table, *hats, '--local', folder, '--answers', file], 'give one'),
        'a budget without prices': ([table, *hats, '--answers', file, '--budget', 1], 'needs --price-in or --price-out'),
        'shots of no examples': ([table, *hats, '--answers', file, '--shots', 2], 'give both')}


def test_bad_input_is_one_line(table, tmp_path, monkeypatch, capsys):
    for what, (args, says) in bad_inputs(tmp_path, table).items():
        monkeypatch.setattr(sys, 'argv', ['hatemm', 'reannotate', *map(str, args), '--out', str(tmp_path/'out')])
        with pytest.raises(SystemExit) as ended: main()
        told = capsys.readouterr().err
        assert ended.value.code == 2 and len(told.splitlines()) == 1 and says in told, (what, told)


def test_missing_pictures_and_neither_word_are_counted(table, hatemm, tmp_path):
    (table.parent/'img/0003.png').unlink()
    (table.parent/'img/0004.png').write_bytes(b'no picture')
    with FakeModel(lambda text, times: 'A man in a hat.' if times == 1 and len(model.asked) == 1 else 'hateful') as model:
        done = hatemm('reannotate', table, '--definition', 'hatemm', '--out', tmp_path/'out', '--endpoint', model.url, '--model', 'm', '--jobs', 1)
    assert done.returncode == 0, done.stderr
    failed = pd.read_csv(tmp_path/'out/failed.csv', dtype=str, keep_default_na=False).set_index('id')
    assert len(failed) == 3 and failed.reason['0003'] == 'its picture: no such file' and 'cannot be decoded' in failed.reason['0004']
    assert failed.answer[failed.reason == 'the answer names neither label'].tolist() == ['A man in a hat.']
    assert set(failed.index) <= set(pd.read_csv(tmp_path/'out/to_annotate.csv', dtype=str).id), 'what the model did not answer goes to people'


def press(page, key):
    "What the page sends when a key is pressed."
    content = {'0': dict(do='skip'), 'u': dict(do='undo')}.get(key) or dict(do='vote', label=int(key) - 1)
    page._handle_custom_msg(content | dict(id=page.state['id']), [])


def test_ten_items_by_keyboard_and_a_restart(table, hatemm, tmp_path):
    write(tmp_path/'answers.csv', 'id,answer', *(f'{i:04d},{"hateful" if i % 2 else "non-hateful"}' for i in range(40)))
    hatemm('reannotate', table, '--definition', 'hatemm', '--answers', tmp_path/'answers.csv', '--out', tmp_path/'out')
    page = annotate(tmp_path/'out', 'anna')
    order = list(page.queue.ids)
    for key in '1u21012u2101': press(page, key)
    assert page.state['id'] == order[8]
    for key in '12': press(page, key)
    assert page.state['progress'].startswith('10 of')
    again = annotate(tmp_path/'out', 'anna')
    assert again.state['id'] == order[10] and again.queue.ids == order
    votes = read_votes(tmp_path/'out/people/anna.csv', order, HATS)
    assert votes.id.tolist() == order[:10] and votes.label.fillna(-1).tolist() == [1, 0, -1, 0, 1, 0, -1, 0, 0, 1] and set(votes['mode']) == {'blind'}
    done = hatemm('reannotate', table, '--definition', 'hatemm', '--answers', tmp_path/'answers.csv', '--out', tmp_path/'out')
    assert 'votes: 8 in' in done.stdout
    assert annotate(tmp_path/'out', 'anna').state['id'] in order[10:], 'the order stays when decided items are gone'


def test_a_killed_kernel_keeps_every_vote(tmp_path):
    ids, path = [f'{i:03d}' for i in range(400)], tmp_path/'anna.csv'

    def vote(ready):
        queue = AnnotationQueue(ids, HATS, path, 'anna')
        ready()
        for name in queue.ids:
            if name not in queue.done:
                queue.vote(name, 1)
                with open(tmp_path/'said.txt', 'a') as f: f.write(name + '\n')
                time.sleep(.002)

    assert kill_runs(vote, times=5, longest=.3) > 0
    said = (tmp_path/'said.txt').read_text().split()
    assert 0 < len(said) and set(said) <= set(past_votes(path)) and len(said) == len(set(said))
    append_vote(path, dict(id='399', annotator='anna', label='hateful', mode='blind', seconds=1., at='2026-11-27T00:00:00+00:00'))
    assert len(join_votes([read_votes(path, ids, HATS)])) >= len(said)
