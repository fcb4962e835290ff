"The image's files: the compose file is of its schema, and the image's steps work without Docker."
import os
import re
import subprocess
import sys
import sysconfig

import pytest
import yaml
from conftest import ROOT


def test_compose_file_is_of_the_schema():
    subprocess.run([sys.executable, '-m', 'check_jsonschema', '--builtin-schema', 'vendor.compose-spec', ROOT/'docker-compose.yml'], check=True, capture_output=True)
    server = yaml.safe_load((ROOT/'docker-compose.yml').read_text())['services']['server']
    assert server['read_only'] and server['user'] == '10001:10001' and server['cap_drop'] == ['ALL'] and server['ports'] == ['127.0.0.1:5000:5000']
    assert all(v['read_only'] for v in server['volumes'] if v['target'] == '/bundle')


def test_the_dockerfile_copies_what_it_runs_and_runs_as_nobody():
    lines = (ROOT/'Dockerfile').read_text().splitlines()
    copied = {word for line in lines if line.startswith('COPY') for word in line.split()[1:-1]}
    assert all((ROOT/name).exists() for name in copied) and {'settings.ini', 'setup.py', 'nbs', 'hatemm_clip', 'docker'} <= copied
    kept = (ROOT/'.dockerignore').read_text().split()
    assert all(any(line == f'!{name}' or line.startswith(f'!{name}/') for line in kept) for name in copied)
    steps = [line for line in lines if re.match('USER|HEALTHCHECK|ENTRYPOINT|CMD', line)]
    assert [step.split()[0] for step in steps] == ['USER', 'HEALTHCHECK', 'ENTRYPOINT', 'CMD'] and '10001' in steps[0]


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    "What the image installs, with the requirements of this environment in place of its own."
    prefix = tmp_path_factory.mktemp('image')/'hatemm'
    subprocess.run(['sh', ROOT/'docker/image.sh', 'install', prefix, '--no-deps'], check=True, capture_output=True, env=dict(os.environ, PYTHON=sys.executable))
    site = next((prefix/'lib').glob('python*'))/'site-packages'
    (site/'here.pth').write_text(sysconfig.get_paths()['purelib'])
    return prefix


def test_the_steps_of_the_image(image, tmp_path):
    from test_score import write_bundle
    bundle = write_bundle(tmp_path/'bundle')
    done = subprocess.run(['sh', ROOT/'docker/image.sh', 'check', image, bundle], capture_output=True, text=True, timeout=240,
                          env=dict({k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}, TMPDIR=str(tmp_path), HOME='/nonexistent', HF_HUB_OFFLINE='1', PORT='5056'))
    assert done.returncode == 0 and 'model 200' in done.stdout, done.stderr[-2000:]
    assert not list(bundle.rglob('*.part*')) and (tmp_path/'jobs').is_dir()
