"""The shell scripts: what they start, what they refuse, what they install."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / 'scripts'
USER = f'{os.getuid()}:{os.getgid()}'


def run(script, *arguments, cwd=ROOT, **environment):
  environment = os.environ | {'POCKETSIZE_VENV': sys.prefix} | environment
  return subprocess.run(
    [SCRIPTS / script, *map(str, arguments)],
    capture_output=True,
    text=True,
    cwd=cwd,
    timeout=300,
    check=False,
    env={k: v for k, v in environment.items() if v is not None},
  )


@pytest.fixture
def net(tmp_path):
  """A net's script that prints its process, arguments and environment."""
  path = tmp_path / 'my net_run.py'
  path.write_text(
    'import json, os, sys\n'
    'print(json.dumps([os.getpid(), sys.argv[1:], os.environ["PYTHONPATH"],\n'
    '                  os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["MALLOC_ARENA_MAX"]]))\n'
    'sys.exit(7 if "--fail" in sys.argv else 0)\n'
  )
  return path


def test_scripts_pass_shellcheck():
  shellcheck = shutil.which('shellcheck', path=f'{sys.prefix}/bin:{os.environ["PATH"]}')
  files = [*sorted(SCRIPTS.glob('*.sh')), ROOT / '.ci' / 'run']
  assert len(files) == 7
  result = subprocess.run(
    [shellcheck, *files], capture_output=True, text=True, cwd=ROOT, check=False
  )
  assert result.returncode == 0, result.stdout


def test_a_module_is_tested_by_one_process(request):
  if not request.config.getoption('loadgroup', False):
    pytest.skip('not a process of xdist that runs groups')
  assert request.node.nodeid.endswith('@test_scripts')


def test_requirements_agree_with_constraints():
  def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return {line.lower().replace('_', '-') for line in lines if '==' in line}

  assert pins('requirements.txt') | pins('requirements-dev.txt') <= pins('constraints.txt')


@pytest.mark.parametrize(
  'workers', [[], ['-n=1'], ['-n', '1'], ['--nb_gpus=1'], ['--nb_workers=1']]
)
def test_arguments_reach_the_net_as_they_are(net, workers):
  flags = ['--learner=uniform', '--name=two words', '-x', "it's", '*', '--help', '']
  result = run(
    'run_local.sh',
    net,
    *flags[:2],
    *workers,
    *flags[2:],
    TF_CPP_MIN_LOG_LEVEL=None,
    MALLOC_ARENA_MAX=None,
    PYTHONPATH=None,
  )
  _, arguments, python_path, log_level, arenas = json.loads(result.stdout)
  assert (arguments, python_path, log_level, arenas) == (flags, str(ROOT), '2', '1')


def test_run_local_becomes_the_net_and_passes_its_exit_code(net):
  process = subprocess.Popen(
    [SCRIPTS / 'run_local.sh', net, '--fail'],
    stdout=subprocess.PIPE,
    env=os.environ | {'POCKETSIZE_VENV': sys.prefix},
  )
  out, _ = process.communicate(timeout=60)
  assert json.loads(out)[0] == process.pid  # so signals reach it
  assert process.returncode == 7


def test_a_net_of_the_repository_is_found_from_anywhere(tmp_path):
  result = run('run_local.sh', 'nets/none_run.py', cwd=tmp_path)
  assert 'nets/convnet_at_digits_run.py' in result.stderr
  command = run(
    'run_cluster.sh', '--hosts=a:1', '--dry_run', 'nets/convnet_at_digits_run.py', cwd=tmp_path
  ).stdout
  assert f' {ROOT}/nets/convnet_at_digits_run.py ' in command


@pytest.mark.parametrize(
  'script, arguments, message',
  [
    ('run_local.sh', [], "must be a net's script, one of nets/.*_run.py. Received: nothing"),
    ('run_local.sh', ['nets/x_run.py'], 'Received: nets/x_run.py'),
    ('run_local.sh', ['NET', '-n=0'], 'whole number from 1 to 9999. Received: -n=0'),
    ('run_local.sh', ['NET', '-n', 'two'], 'whole number from 1 to 9999. Received: -n=two'),
    ('run_local.sh', ['NET', '-n'], '-n needs the number of workers'),
    ('run_cluster.sh', ['NET'], 'must be HOST:WORKERS.*, as in --hosts=h1:4,h2:4. Received'),
    (
      'run_cluster.sh',
      ['NET', '--hosts=h1:4,h2'],
      'must be HOST:WORKERS.*Received: --hosts=h1:4,h2',
    ),
    ('run_cluster.sh', ['NET', '--hosts=h1:0'], 'must be HOST:WORKERS.*Received: --hosts=h1:0'),
    ('run_cluster.sh', ['NET', '--hosts=h 1:2'], 'must be HOST:WORKERS.*Received: --hosts=h 1:2'),
    ('run_cluster.sh', ['NET', '--hosts=h:2', '-n=2'], 'says how many workers run where'),
    ('run_docker.sh', ['NET', '--data_dir_local=/no/such'], 'must exist. Received: /no/such'),
    ('run_docker.sh', ['NET', '--pretrained=/no/such'], 'must name a file. Received: --pretrained'),
    ('run_docker.sh', ['NET', '--pretrained'], '--pretrained needs a value'),
    (
      'install_horovod.sh',
      ['--wheel=/no/such.whl'],
      'must name a file. Received: --wheel=/no/such',
    ),
    ('install_horovod.sh', ['--fast'], 'legal arguments are .* Received: --fast'),
  ],
)
def test_bad_arguments_get_one_sentence_and_code_2(script, arguments, message, net):
  result = run(
    script, *[net if argument == 'NET' else argument for argument in arguments], cwd=net.parent
  )
  assert result.returncode == 2
  assert result.stdout == ''
  assert result.stderr.startswith(f'{script}: ') and result.stderr.count('\n') == 1
  assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize(
  'script', ['run_local.sh', 'run_docker.sh', 'run_cluster.sh', 'install_horovod.sh']
)
def test_help_shows_the_usage(script):
  result = run(script, '--help')
  assert result.returncode == 0
  assert f'scripts/{script} ' in result.stdout
  assert 'set -euo' not in result.stdout


def test_several_workers_without_horovod_are_told_how_to_install_it(net, tmp_path):
  subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'v'], check=True)
  result = run('run_local.sh', net, '-n=2', POCKETSIZE_VENV=str(tmp_path / 'v'))
  assert result.returncode == 2
  assert result.stderr == (
    'run_local.sh: several workers need Horovod; install it with '
    'scripts/install_horovod.sh, or leave -n out.\n'
  )


def test_an_environment_that_is_none_is_refused(net, tmp_path):
  result = run('run_local.sh', net, POCKETSIZE_VENV=str(tmp_path))
  assert result.returncode == 2
  assert f'with bin/python. Received: POCKETSIZE_VENV={tmp_path}.' in result.stderr


def test_docker_command(tmp_path):
  (tmp_path / 'my data').mkdir()
  (tmp_path / 'w.npz').touch()
  result = run(
    'run_docker.sh',
    '--dry_run',
    'nets/resnet_at_cifar10_run.py',
    '-n=2',
    '--gpus=all',
    '--data_dir_local=my data',
    '--learner=uniform',
    '--pretrained=w.npz',
    '--work_dir',
    'my runs',
    '--note=a b',
    cwd=tmp_path,
  )
  assert result.stderr == ''
  assert result.stdout == (
    f'docker run --rm --init --user {USER} --env HOME=/tmp --gpus all '
    f'--mount type=bind\\,source={tmp_path}/w.npz\\,target=/pretrained/0/w.npz\\,readonly '
    f'--mount type=bind\\,source={tmp_path}/my\\ data\\,target=/data\\,readonly '
    f'--mount type=bind\\,source={tmp_path}/my\\ runs\\,target=/pocketsize/work '
    'pocketsize nets/resnet_at_cifar10_run.py -n=2 --learner=uniform '
    '--pretrained=/pretrained/0/w.npz --note=a\\ b --data_dir_local=/data '
    '--work_dir=/pocketsize/work\n'
  )


def test_docker_takes_the_data_folder_of_the_environment_or_path_conf(tmp_path):
  (tmp_path / 'a').mkdir()
  archive = tmp_path / 'b.tar.gz'
  archive.touch()
  (tmp_path / 'path.conf').write_text(f'data_dir_local_cifar10 = {archive}  # all of it\n')
  command = ['run_docker.sh', '--dry_run', '--image=mine:1', 'nets/lenet_at_cifar10_run.py']
  by_environment = run(*command, cwd=tmp_path, POCKETSIZE_DATA_DIR_CIFAR10=str(tmp_path / 'a'))
  by_conf = run(*command, cwd=tmp_path, POCKETSIZE_DATA_DIR_CIFAR10=None)
  user = f'docker run --rm --init --user {USER} --env HOME=/tmp'
  runs = f'--mount type=bind\\,source={tmp_path}/runs\\,target=/pocketsize/runs'
  net = 'mine:1 nets/lenet_at_cifar10_run.py -n=1'
  assert by_environment.stdout == (
    f'{user} --mount type=bind\\,source={tmp_path}/a\\,target=/data\\,readonly {runs} '
    f'{net} --data_dir_local=/data\n'
  )
  assert by_conf.stdout == (
    f'{user} --mount type=bind\\,source={archive}\\,target=/data/b.tar.gz\\,readonly {runs} '
    f'{net} --data_dir_local=/data/b.tar.gz\n'
  )


def test_without_a_docker_engine_there_is_one_sentence(tmp_path):
  docker = tmp_path / 'docker'
  docker.write_text('#!/bin/sh\necho "no daemon" >&2\nexit 1\n')
  docker.chmod(0o755)
  result = run(
    'run_docker.sh',
    'nets/convnet_at_digits_run.py',
    cwd=tmp_path,
    PATH=f'{tmp_path}:{os.environ["PATH"]}',
  )
  assert result.returncode == 2
  assert result.stderr == (
    'run_docker.sh: no Docker engine answers here; start one, or use scripts/run_local.sh.\n'
  )


def test_cluster_command():
  result = run(
    'run_cluster.sh',
    '--hosts=h1:4,h2:4',
    'nets/convnet_at_digits_run.py',
    '--learner=uniform',
    '--work_dir=my runs',
    '--dry_run',
  )
  python = f'{sys.prefix}/bin/python'
  assert result.stderr == ''
  assert result.stdout == (
    f'{python} {SCRIPTS}/run_workers.py {sys.prefix}/bin/horovodrun --gloo -np 8 -H h1:4\\,h2:4 '
    f'{python} nets/convnet_at_digits_run.py --learner=uniform --work_dir=my\\ runs '
    '--enbl_multi_gpu\n'
  )


@pytest.fixture
def clone(tmp_path, net):
  """A repository whose one requirement is a wheel that is not there yet."""
  root = tmp_path / 'a clone'
  shutil.copytree(SCRIPTS, root / 'scripts')
  (root / 'constraints.txt').write_text('')
  (root / 'requirements.txt').write_text('./small-1-py3-none-any.whl\n')

  def start(**environment):
    environment = {k: v for k, v in os.environ.items() if k != 'POCKETSIZE_VENV'} | environment
    return subprocess.run(
      [root / 'scripts' / 'run_local.sh', net],
      capture_output=True,
      text=True,
      cwd=root,
      env=environment,
      timeout=120,
      check=False,
    )

  return root, start


@pytest.mark.skipif(not shutil.which('python3.11'), reason='python3.11 is not on the PATH')
def test_the_environment_is_made_once_and_a_failed_installation_is_done_again(clone):
  root, start = clone
  failed = start()
  assert failed.returncode != 0
  assert failed.stdout == ''
  assert not (root / '.venv' / '.pocketsize' / 'requirements.txt').exists()

  with zipfile.ZipFile(root / 'small-1-py3-none-any.whl', 'w') as wheel:
    info = 'small-1.dist-info'
    wheel.writestr(f'{info}/METADATA', 'Metadata-Version: 2.1\nName: small\nVersion: 1\n')
    wheel.writestr(
      f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n'
    )
    wheel.writestr(f'{info}/RECORD', f'{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n')
  again = start()
  assert again.returncode == 0, again.stderr
  assert again.stderr.startswith('Installing requirements.txt')  # .venv itself was there

  second = start()
  assert second.returncode == 0
  assert second.stderr == ''

  (root / 'requirements.txt').write_text('')
  assert 'Installing' in start().stderr


def test_without_python_there_is_one_sentence(clone, tmp_path):
  tools = tmp_path / 'tools'
  tools.mkdir()
  for name in ('basename', 'bash', 'cat', 'cmp', 'dirname', 'env', 'mkdir', 'sed'):
    (tools / name).symlink_to(shutil.which(name))
  _, start = clone
  result = start(PATH=str(tools))
  assert result.returncode == 2
  assert result.stderr == (
    'run_local.sh: Python 3.11 is needed and python3.11 is not on the PATH; '
    'install it and start again.\n'
  )
