"A server whose scorer looks at nothing: brightness is the probability. As a program it listens until it is ended."
import json
import os
import signal
import sys
import time

import httpx
import warm

from hatemm_clip.base import InputError
from hatemm_clip.media import probe
from hatemm_clip.serve import ServeSettings, serve


class Toy:
    "Answers as a Scorer does. Words of its items can make it slow, or break it."

    def __init__(self, word=''): self.word = word

    def info(self): return dict(card='a toy', bundle='/srv/secret/folder')

    def warm_up(self): pass

    def score_many(self, items, explained=True):
        for item in items:
            if (item.text or '').startswith('sleep '): time.sleep(float(item.text.split()[1]))
            if item.text == 'boom': raise RuntimeError(f'{item.text} in {item.path}')
        return [self.row(item) for item in items]

    def row(self, item):
        p = float(item.picture.mean()/255) if item.picture is not None else .5
        error = f'{item.path or item.name}: cannot be scored' if item.text == 'fail' else None
        if item.path and not error: assert probe(item.path)['duration'] >= 0
        return dict(file=item.name, label='Hate' if p >= .5 else 'Non Hate', prob=p, prob_of='Hate', threshold=.5,
                    probabilities={'Non Hate': 1 - p, 'Hate': p}, needs_review=False, review=[], notes=[], demo=True, rule='the mean',
                    timeline=[dict(start=0., end=1., prob=p)], transcript=item.text or '', ocr='', error=error,
                    windows=[dict(start=0., end=1., text='word', kind='text', contribution=.1)],
                    frames=[dict(time=0., contribution=.1)], modalities=dict(image=.1))


def load_toy(bundle, settings):
    "A Toy for any bundle but those that are called after what is wrong with them."
    if 'broken' in str(bundle): raise InputError(f'{bundle}: not the weights that config.json describes')
    if 'slow' in str(bundle): time.sleep(1.)
    return Toy()


class Running:
    "A server in a process of its own."

    def __init__(self, bundles, folder, wait=True, **settings): # folder: gets its log, and is its temporary folder
        command = [sys.executable, __file__, json.dumps([[str(b) for b in bundles], dict(port=0) | settings])]
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder.with_suffix(f'.{time.monotonic_ns()}.log')
        with open(self.log, 'w') as log: self.process = warm.Fork(command, stderr=log, env=dict(os.environ, TMPDIR=str(folder)))
        while '"listening"' not in self.told():
            if self.process.poll() is not None: raise RuntimeError(self.told())
            time.sleep(.02)
        self.url = next(json.loads(line)['url'] for line in self.told().splitlines() if '"listening"' in line)
        self.port = int(self.url.rsplit(':')[-1])
        self.client = httpx.Client(base_url=self.url, timeout=20.)
        if wait: self.wait()

    def told(self): return self.log.read_text()

    def wait(self):
        while self.client.get('/readyz').status_code != 200: time.sleep(.02)

    def stop(self, how=signal.SIGTERM):
        "End it; gives its exit status."
        self.process.send_signal(how)
        self.client.close()
        return self.process.wait(30)


if __name__ == '__main__':
    names, settings = json.loads(sys.argv[1])
    try: serve(names, ServeSettings(**settings), load_toy)
    except InputError as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)
