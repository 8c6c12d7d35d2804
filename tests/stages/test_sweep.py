"""`bigssl sweep`: words of launchers, sweeps with a stub for `bigssl run`, and a real one."""

import csv
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from bigssl_jax import cli
from bigssl_jax.config import UserError
from bigssl_jax.data.errors import DataError
from bigssl_jax.data.folder import file_lock
from bigssl_jax.stages.sweep import launch_words, sweep_command

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
TONES = f'{HERE / "tone_experiment.py"}:manifest.jsonl'
COMMAND = ['python', '-m', 'x', '--config.name=a b; rm -rf "$HOME" \'\n{x}']

# Does what `bigssl run` does to its workdir: a score that follows from seed and peak.
STUB = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
config = json.loads((folder / 'point.json').read_text())['config']
peak = config['stages']['student']['optimizer']['groups']['all']['peak']
if (pathlib.Path(__file__).parent / f"fail-{config['seed']}").exists():
    sys.exit('bigssl: no luck')
(folder / 'config.json').write_text(json.dumps({'config': config}))
score = {'value': peak * 10 + config['seed'], 'low': 0.0, 'high': 1.0, 'words': 9}
scores = {'test': {'student': {'wer': score, 'cer': score, 'utterances': 3}}}
for name in ('prepare', *config['recipe']):
    (folder / name).mkdir()
    (folder / name / 'done.json').write_text(json.dumps({'kind': name, 'results': {}}))
(folder / 'evaluate' / 'scores.json').write_text(json.dumps(scores))
"""


@pytest.fixture
def files(tmp_path):
    """A sweep file of six points, and the stub."""
    (tmp_path / 'stub.py').write_text(STUB)
    (tmp_path / 'six.py').write_text(
        'from bigssl_jax.sweeps import product, sweep\n'
        'PEAK = "stages.student.optimizer.groups.all.peak"\n'
        'def get_sweep(last="2"):\n'
        '    return product(sweep("seed", range(int(last) + 1)), sweep(PEAK, [2e-3, 1e-3]))\n'
    )
    return tmp_path


def stub_sweep(files: pathlib.Path, sweep: str = 'six.py', **given) -> dict:
    launcher = f'{sys.executable} -S {files / "stub.py"} {{workdir}} {{command}}'
    return sweep_command(
        TONES, str(files / sweep), given.pop('overrides', []), str(files / 'runs'),
        launcher=launcher, **given,
    )  # fmt: skip


def states(result: dict) -> dict[str, str]:
    return {run['name']: run['state'] for run in sorted(result['runs'], key=lambda r: r['name'])}


# ---------------------------------------------------------------------------------------------
# launchers


VALUES = {'name': '007-x_0.1', 'job': 'run-007-1f', 'workdir': '/w/7', 'log': '/w/7/job.txt'}


def test_no_shell_reads_the_words_of_a_launcher():
    launcher = 'sbatch --job-name={name} -o {log} run.sh {job} {command}'
    words = ['sbatch', '--job-name=007-x_0.1', '-o', '/w/7/job.txt', 'run.sh', 'run-007-1f']
    assert launch_words(launcher, COMMAND, VALUES) == [*words, *COMMAND]
    wrapped = launch_words("submit --wrap='cd {workdir} && {command}'", COMMAND, VALUES)
    assert wrapped[:1] == ['submit']
    assert shlex.split(wrapped[1]) == ['--wrap=cd', '/w/7', '&&', *COMMAND]
    assert launch_words('', COMMAND, VALUES) == COMMAND


def test_a_command_within_a_word_survives_a_real_shell():
    command = [sys.executable, '-S', '-c', 'import sys; print(ascii(sys.argv[1:]))', *COMMAND[3:]]
    words = launch_words('sh -c {command}', command, VALUES)
    assert words == ['sh', '-c', *command]  # a word of its own stays words
    words = launch_words("sh -c 'exec {command}'", command, VALUES)
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == ascii(COMMAND[3:]) + '\n'


@pytest.mark.parametrize(
    ('launcher', 'told'),
    [
        ('sbatch run.sh', 'it needs {command}'),
        ('sbatch {comand}', 'unknown placeholder {comand}; there are {name}'),
        ("sbatch 'x {command}", 'No closing quotation'),
        ('sbatch {command!r}', 'unknown placeholder {command}'),
        ('sbatch {command', "expected '}'"),
        ('sbatch {} {command}', 'unknown placeholder {}'),
    ],
)
def test_a_bad_launcher_is_one_line(launcher, told):
    with pytest.raises(UserError) as error:
        launch_words(launcher, COMMAND, VALUES)
    assert told in str(error.value)


# ---------------------------------------------------------------------------------------------
# sweeps of stubs


def test_a_sweep_runs_collects_and_does_nothing_twice(files, capsys):
    result = stub_sweep(files, jobs=2)
    assert set(states(result).values()) == {'done'}
    assert (result['metric'], result['states']) == ('test.student.wer', {'done': 6})
    expected = sorted((seed + 10 * peak, seed, peak) for seed in range(3) for peak in (1e-3, 2e-3))
    found = [(r['metrics']['test.student.wer'], *r['values'].values()) for r in result['runs']]
    assert found == expected
    assert result['runs'][0]['intervals']['test.student.wer'] == (0.0, 1.0)
    out = capsys.readouterr().out
    assert '6 of 6 runs to do, 2 at a time' in out
    assert f'best: {files / "runs" / "001-seed_0-peak_0.001"}, test.student.wer 1.0 %' in out
    assert out.count('started') == 6

    written = json.loads((files / 'runs' / 'sweep.json').read_text())
    assert written == json.loads(json.dumps(result))
    lines = list(csv.DictReader((files / 'runs' / 'sweep.csv').open()))
    assert [float(line['test.student.wer']) for line in lines] == [wer for wer, _, _ in expected]
    assert set(lines[0]) >= {'seed', 'stages.student.optimizer.groups.all.peak'}
    assert 'data_dir' not in lines[0]

    again = stub_sweep(files)
    assert again == result
    assert 'nothing to do' in capsys.readouterr().out
    best = stub_sweep(files, action='collect', metrics=['test.student.cer:max', 'test.student.wer'])
    assert [run['name'] for run in best['runs']] == [r['name'] for r in result['runs']][::-1]


def test_failed_runs_are_reported_kept_and_retried_on_request(files, capsys):
    (files / 'fail-1').touch()
    result = stub_sweep(files, metrics=['test.student.wer'])
    assert list(states(result).values()) == ['done'] * 2 + ['failed'] * 2 + ['done'] * 2
    assert [run['state'] for run in result['runs']][-2:] == ['failed'] * 2
    assert '    | bigssl: no luck' in capsys.readouterr().out
    (files / 'fail-1').unlink()
    assert stub_sweep(files)['states'] == {'done': 4, 'failed': 2}
    out = capsys.readouterr().out
    assert '    | bigssl: no luck' in out
    assert '--retry starts it again' in out
    assert stub_sweep(files, retry=True)['states'] == {'done': 6}


def test_a_sweep_that_grows_keeps_what_is_done(files):
    first = stub_sweep(files, 'six.py:1')
    times = {path: path.stat().st_mtime_ns for path in (files / 'runs').glob('*/config.json')}
    grown = stub_sweep(files)
    assert list(states(grown))[:4] == list(states(first))
    assert len(times) == 4
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_folder_of_another_config_stops_the_sweep_before_it_starts(files):
    stub_sweep(files, 'six.py:1')
    with pytest.raises(UserError, match=r'000-seed_0-peak_0.002 was made by another config \(stag'):
        stub_sweep(files, overrides=[('stages.student.steps', '99')])
    assert not list((files / 'runs').glob('004-*'))


def test_a_run_that_turned_out_to_be_another_is_noticed(files):
    stub_sweep(files, 'six.py:0')
    path = files / 'runs' / '000-peak_0.002' / 'config.json'
    info = json.loads(path.read_text())
    info['config']['seed'] = 9
    path.write_text(json.dumps(info))
    with pytest.raises(
        UserError, match=r'000-peak_0.002 was made by another config \(seed: 9 -> 0'
    ):
        stub_sweep(files, 'six.py:0', action='collect')


def test_a_misspelt_metric_loses_no_result(files):
    with pytest.raises(UserError, match="did you mean 'test.student.wer'"):
        stub_sweep(files, metrics=['test.studnt.wer'])
    written = json.loads((files / 'runs' / 'sweep.json').read_text())
    assert {run['state'] for run in written['runs']} == {'done'}


def test_every_run_has_a_job_name_that_schedulers_take(files):
    launcher = f'{sys.executable} -S -c "import sys; print(sys.argv[1])" {{job}} {{command}}'
    folder = files / 'runs'
    result = sweep_command(TONES, str(files / 'six.py'), [], str(folder), launcher=launcher, jobs=3)
    assert result['states'] == {'submitted': 6}
    jobs = [(folder / run['name'] / 'log.txt').read_text().split()[-1] for run in result['runs']]
    assert len(set(jobs)) == 6
    assert all(re.fullmatch(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?', job) for job in jobs)
    # Submitted ones are not submitted twice.
    sweep_command(TONES, str(files / 'six.py'), [], str(folder), launcher=launcher)
    logs = [(folder / run['name'] / 'log.txt').read_text() for run in result['runs']]
    assert all(log.count('attempt') == 1 for log in logs)


def test_one_sweep_at_a_time_works_in_a_folder(files):
    (files / 'runs').mkdir()
    with (
        file_lock(str(files / 'runs' / '.sweep.lock')),
        pytest.raises(DataError, match='another process is at work'),
    ):
        stub_sweep(files)
    assert not list((files / 'runs').glob('*/status.json'))


def test_a_list_starts_nothing_and_knows_the_hours(files, capsys):
    result = sweep_command(TONES, str(files / 'six.py'), [], None, action='list')
    # 3 fine-tunings of 100 steps and a pre-training of 40, 10 seconds of audio a step
    assert [run['audio_hours'] for run in result['runs']] == [round(3400 / 3600, 3)] * 6
    assert [run['state'] for run in result['runs']] == ['waiting'] * 6
    out = capsys.readouterr().out
    assert '000-seed_0-peak_0.002' in out
    assert '6 runs, 5.7 hours of training audio' in out
    stub_sweep(files, 'six.py:0')
    listed = sweep_command(TONES, str(files / 'six.py'), [], str(files / 'runs'), action='list')
    assert [run['state'] for run in listed['runs']] == ['done'] * 2 + ['waiting'] * 4


@pytest.mark.parametrize(
    ('words', 'told'),
    [
        ((), 'needs --workdir DIR to run'),
        (('--collect',), 'needs --workdir DIR to collect'),
        (('--collect', '--workdir', 'no/such'), 'no/such: there is no such folder'),
        (('--workdir', 'OUT', '--jobs', '0'), '--jobs 0: at least 1'),
        (('--workdir', 'OUT', '--launcher', 'no-such-tool {command}'), "command 'no-such-tool'"),
        (('--workdir', 'OUT', '--config.seed=2'), '--config.seed=2: the sweep varies this field'),
        (('--list', '--config.sede=2'), "did you mean 'seed'"),
        (('--list', '--sweep', 'no-such.py'), "--sweep: no file 'no-such.py'; give a Python file"),
    ],
)
def test_what_the_user_can_mend_is_one_line(words, told, files, capsys):
    words = [str(files / 'runs') if word == 'OUT' else word for word in words]
    command = ['sweep', '--config', TONES, '--sweep', str(files / 'six.py'), *words]
    assert cli.main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0]
    assert not (files / 'runs').exists()


def test_exit_codes_and_json_tell_failures(files, capsys):
    (files / 'fail-2').touch()
    launcher = f'{sys.executable} -S {files / "stub.py"} {{workdir}} {{command}}'
    command = ['sweep', '--config', TONES, '--sweep', str(files / 'six.py'), '--workdir',
               str(files / 'runs'), '--json', str(files / 'out.json')]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, '--launcher', launcher])
    assert stop.value.code == 2
    assert '2 runs failed; --retry' in capsys.readouterr().err
    assert json.loads((files / 'out.json').read_text())['states'] == {'done': 4, 'failed': 2}
    assert cli.main([*command, '--collect']) == 0


def test_the_example_sweep_lists():
    result = sweep_command(
        str(ROOT / 'experiments' / 'quickstart.py'),
        str(ROOT / 'experiments' / 'sweeps' / 'learning_rate.py'),
        [],
        None,
        action='list',
    )
    assert len({run['hash'] for run in result['runs']}) == 6


# ---------------------------------------------------------------------------------------------
# real runs


REAL = """
from bigssl_jax.sweeps import product, sweep, zip_
PEAK = 'stages.supervised.optimizer.groups.all.peak'
def get_sweep():
    return product(
        sweep('seed', [3, 4, 5]),
        zip_(sweep(PEAK, [8e-3, 2e-3]), sweep('encoder.dropout', [0.05, 0.0])),
    )
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_six_runs_interrupted_in_the_middle_give_the_table_of_their_files(
    recipe, tmp_path, request
):
    (tmp_path / 'six.py').write_text(REAL)
    workdir = tmp_path / 'sweep'
    words = [
        sys.executable, '-m', 'bigssl_jax', 'sweep', '--workdir', str(workdir), '--jobs', '2',
        '--config', f'{HERE / "tone_experiment.py"}:{recipe.manifest}',
        '--sweep', str(tmp_path / 'six.py'), '--json', str(tmp_path / 'out.json'),
        '--config.recipe=("supervised", "evaluate")',
        '--config.stages.evaluate.models=("supervised",)', '--config.stages.evaluate.compare=()',
        '--metric', 'test.supervised.cer,test.supervised.wer',
    ]  # fmt: skip

    def start() -> subprocess.Popen:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=recipe.environment(),
        )  # fmt: skip
        request.addfinalizer(process.terminate)  # twice: at once
        request.addfinalizer(process.terminate)
        return process

    def finished() -> list[pathlib.Path]:
        return sorted(workdir.glob('*/evaluate/done.json'))

    def mid_training() -> bool:
        begun = set(workdir.glob('*/supervised/metrics.jsonl'))
        return len(finished()) >= 2 and len(begun) > len(finished())

    process = start()
    limit = time.monotonic() + 800
    while not mid_training():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)
    before = {path: path.stat().st_mtime_ns for path in finished()}
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 75, (out, err)
    assert 'the same command continues' in err
    stopped = json.loads((tmp_path / 'out.json').read_text())['states']
    assert stopped['done'] >= 2
    assert stopped.get('failed', 0) == 0
    assert 1 <= stopped['stopped'] <= 2
    assert sum(stopped.values()) == 6

    process = start()
    out, err = process.communicate(timeout=800)
    assert process.returncode == 0, (out, err)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    result = json.loads((tmp_path / 'out.json').read_text())
    assert result['states'] == {'done': 6}
    # Corpora were prepared once, by one of the two runs that wanted them at the same time.
    assert len(list(workdir.rglob('corpus.json'))) == 1
    prepared = [json.loads(p.read_text()) for p in workdir.glob('*/prepare/done.json')]
    assert len({json.dumps(done['outputs']['corpora']) for done in prepared}) == 1

    rates = []
    for run in result['runs']:
        folder = workdir / run['name']
        score = json.loads((folder / 'evaluate' / 'scores.json').read_text())['test']['supervised']
        done = json.loads((folder / 'evaluate' / 'done.json').read_text())
        assert run['metrics']['test.supervised.cer'] == score['cer']['value']
        assert run['metrics']['test.supervised.wer'] == done['results']['test supervised WER']
        assert run['intervals']['test.supervised.cer'] == [
            score['cer']['low'],
            score['cer']['high'],
        ]
        config = json.loads((folder / 'config.json').read_text())['config']
        group = config['stages']['supervised']['optimizer']['groups']['all']
        assert run['differs'] == {
            'seed': config['seed'],
            'encoder.dropout': config['encoder']['dropout'],
            'stages.supervised.optimizer.groups.all.peak': group['peak'],
        }
        rates.append(score['cer']['value'])
        shown = f'{100 * score["cer"]["value"]:.1f} %'
        assert shown in out
    assert rates == sorted(rates)
    assert (
        len({(r['differs']['seed'], r['differs']['encoder.dropout']) for r in result['runs']}) == 6
    )
    assert f'best: {workdir / result["runs"][0]["name"]}' in out
