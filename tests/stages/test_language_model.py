"""A language model trained by the one loop: it learns its text, stops and continues, is fused."""

import dataclasses
import gzip
import json
import shutil
import types

import jax
import numpy as np
import pytest

from bigssl_jax.config import ConfigError, UserError
from bigssl_jax.data.tokenizer import train_tokenizer
from bigssl_jax.decoding import fusion
from bigssl_jax.parallel import make_mesh
from bigssl_jax.stages import language_model, schema
from bigssl_jax.stages.context import Context
from bigssl_jax.stages.fusion_model import load_language_model
from bigssl_jax.stages.model import load_model
from bigssl_jax.stages.shared_encoder import encoder_identity
from bigssl_jax.training.signals import Stopped, StopRequest

STEPS = 60


def experiment(**stage) -> dict:
    """A tiny language model on text files; the speech is only named."""
    model = {'num_layers': 1, 'model_dim': 32, 'num_heads': 2, 'dropout': 0.0}
    fields = {
        'kind': 'language_model',
        'steps': STEPS,
        'objectives': {'lm': {'objective': 'next_token', 'stream': 'text', **model}},
        'streams': {
            'text': {
                'sources': {'files': {'texts': ('a.txt', 'b.txt.gz')}},
                'batch_tokens': 512, 'num_buckets': 1,
            }
        },
        'optimizer': {'groups': {'all': {'peak': 2e-2, 'warmup': 10, 'schedule': 'cosine'}}},
        'log_every': 10, 'save_every': 20, 'eval_every': 30, 'dev': 'dev', 'keep': 3,
        'keep_best': 1,
    }  # fmt: skip
    fields.update(stage)
    return {
        'corpora': {'speech': {'manifest': 'none'}},
        'selections': {'all': {'corpus': 'speech'}, 'dev': {'corpus': 'speech'}},
        'statistics': {'selection': 'all'},
        'tokenizer': {'selection': 'all'},
        'compute': {'tensorboard': False, 'watchdog_minutes': 0.0},
        'stages': {'lm': fields},
        'recipe': ('lm',),
    }


def made_up_lines(count, seed):
    """A language of three words where each is followed by one of two: 1 bit a word."""
    rng = np.random.default_rng(seed)
    following = {'ab': ('cab', 'ba'), 'cab': ('ba', 'ab'), 'ba': ('ab', 'cab')}
    lines = []
    for _ in range(count):
        words = ['ab']
        while len(words) < 6:
            words.append(following[words[-1]][rng.integers(2)])
        lines.append(' '.join(words))
    return lines


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp('text')
    lines = made_up_lines(300, 0)
    (folder / 'a.txt').write_text('\n'.join(lines[:200]))
    with gzip.open(folder / 'b.txt.gz', 'wt') as file:
        file.write('\n'.join(lines[200:]))
    train_tokenizer(lines, folder / 'tokenizer' / 'tokenizer.model')
    return folder


def context_of(workdir, text) -> Context:
    """The stage's surroundings, as the prepare stage would leave them."""
    files = {'texts': (str(text / 'a.txt'), str(text / 'b.txt.gz'))}
    config = experiment()
    config['stages']['lm']['streams']['text']['sources'] = {'files': files}
    (workdir / 'lm').mkdir(parents=True)
    shutil.copytree(text / 'tokenizer', workdir / 'tokenizer')
    mesh = make_mesh({'data': -1}, jax.devices()[:1])
    return Context(schema.resolve(config), 'lm', workdir, mesh, StopRequest())


@pytest.fixture(scope='module')
def trained(text, tmp_path_factory):
    """The stage, run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, 'transcripts', lambda selection: iter(made_up_lines(40, 1)))
        patch.setattr(Context, 'selection', lambda self, name: {'corpus': name})
        context = context_of(tmp_path_factory.mktemp('run'), text)
        outputs, results = language_model.run(context)
        again = dataclasses.replace(
            context_of(tmp_path_factory.mktemp('again'), text), stop=Halting(4)
        )
        with pytest.raises(Stopped):
            language_model.run(again)
        continued = language_model.run(dataclasses.replace(again, stop=StopRequest()))
    return types.SimpleNamespace(
        context=context, outputs=outputs, results=results, continued=continued[0]
    )


class Halting:
    """Asks for a stop after so many looks."""

    def __init__(self, looks):
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        return self.looks < 0


def test_it_learns_the_text(trained):
    log = trained.context.directory / 'metrics.jsonl'
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    # Five choices of 1 bit in six words and an end: 2^(5 / 7) per word at best.
    best = 2 ** (5 / 7)
    assert best * 0.97 < lines[-1]['lm/word_perplexity'] < best * 1.25
    assert best * 0.97 < lines[-1]['dev_word_perplexity'] < best * 1.25
    assert lines[0]['lm/word_perplexity'] > 3 * best
    assert lines[-1]['tokens_per_second'] > 0 and 'audio_seconds_per_second' not in lines[-1]
    assert trained.results['steps'] == STEPS and trained.results['excluded'] == {
        'lm': {'files': {}}
    }


def test_stopped_and_continued_gives_the_same_bits(trained):
    assert trained.continued == trained.outputs


def test_the_folder_is_fused_with_a_recogniser_of_the_same_pieces(trained, text, tmp_path):
    mesh = trained.context.mesh
    model = load_model(trained.context.directory)
    assert model.encoder is None
    with pytest.raises(UserError, match='no transcript head'):
        model.transcript_head()
    from bigssl_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(model.tokenizer_path)
    fused = load_language_model(trained.context.directory, tokenizer, mesh)
    likely, unlikely = (tokenizer.encode(t) for t in ('ab cab ba ab ba cab', 'ba ba cab cab ab ab'))
    tokens = np.zeros((2, 24), np.int32)
    tokens[0, : len(likely)], tokens[1, : len(unlikely)] = likely, unlikely
    counts = np.array([len(likely), len(unlikely)], np.int32)
    scores = jax.jit(fusion.sequence_scores)(fused, tokens, counts)
    assert float(scores[0]) == pytest.approx(-5 * np.log(2), abs=0.8)
    assert float(scores[1]) < float(scores[0]) - 5
    other = types.SimpleNamespace(hash='0' * 64, path='teacher')
    with pytest.raises(UserError, match='another tokenizer .* than teacher .000000000000'):
        load_language_model(trained.context.directory, other, mesh)


def test_no_encoder_starts_from_a_language_model(trained):
    with pytest.raises(ConfigError, match='a language model, which has no encoder'):
        encoder_identity('teacher', str(trained.context.directory), False)


@pytest.mark.parametrize(
    'change, told',
    [
        ({'objectives': {'lm': {'objective': 'ctc', 'stream': 'text'}}}, 'lm.objective'),
        ({'init_from': 'x'}, 'init_from'),
        ({'streams': {'text': {'sources': {'s': {}}}}}, 'either a selection'),
        ({'streams': {'text': {'sources': {'s': {'texts': 'a.txt'}}}}}, 'must be a list'),
        ({'streams': {'text': {'sources': {'s': {'selection': 'no'}}}}}, "'no', which is not"),
        ({'dev': 'nowhere'}, 'nowhere'),
        (
            {'objectives': {'lm': {'objective': 'next_token', 'stream': 'text', 'preset': 'x'}}},
            "language model 'x'",
        ),
    ],
)
def test_bad_fields_are_named_before_any_work(change, told):
    with pytest.raises(ConfigError, match=told):
        schema.resolve(experiment(**change))


def test_stages_that_hear_audio_do_not_predict_text():
    config = experiment(kind='pretrain')
    config['stages']['lm']['streams'] = {'text': {'sources': {'s': {'selection': 'all'}}}}
    with pytest.raises(ConfigError, match='next_token'):
        schema.resolve(config)
