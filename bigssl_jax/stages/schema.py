"""What an experiment config may say: every field with its default, and the cross-field checks.

    corpora      name -> where the speech comes from
    selections   name -> which rows of a corpus
    tokenizer    trained on the texts of one selection
    stages       name -> fields of its kind (pretrain, finetune, language_model, pseudo_label,
                 evaluate, ngram, probe)
    recipe       the order in which the stages run; 'prepare' comes first by itself

`resolve` lays an experiment's config over these defaults and checks what it refers to.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from bigssl_jax.audio import AudioConfig, NoiseConfig, SpecAugmentConfig, SpeedConfig
from bigssl_jax.config import ConfigError, choose, config_hash, merge, to_dict, unknown_field
from bigssl_jax.data import selection as selection_lib
from bigssl_jax.models import ConformerConfig
from bigssl_jax.models.presets import NAMES, conformer
from bigssl_jax.objectives import TRANSCRIPT, BestRQ, NextToken, Wav2Vec2
from bigssl_jax.stages.comparisons import check_compare, check_pairs, other_stages
from bigssl_jax.stages.decoder_fields import (
    DECODER,
    TUNE,
    check_decoder,
    file_hashes,
    language_model_stages,
)
from bigssl_jax.stages.field_values import (
    OPTIONAL,
    check_keeping,
    check_names,
    check_selection,
    check_table,
    check_texts,
    check_values,
    group,
    without,
)
from bigssl_jax.stages.label_fields import (
    FREE,
    PSEUDO_LABEL,
    check_labelling,
    check_labels,
    check_steps,
    filters_of,
    fitted_on,
)
from bigssl_jax.stages.probe_fields import PROBE, check_probe, probe_selections, probed_models
from bigssl_jax.stages.shared_encoder import encoder_identity, is_path
from bigssl_jax.training.guard import GuardSettings
from bigssl_jax.training.optimizers import ALGORITHMS, GROUP_DEFAULTS
from bigssl_jax.training.schedules import SHAPES

# What hears audio, and what reads text: no stage mixes them.
AUDIO_OBJECTIVES: dict[str, Any] = {'best_rq': BestRQ, 'wav2vec2': Wav2Vec2, **TRANSCRIPT}
TEXT_OBJECTIVES: dict[str, Any] = {'next_token': NextToken}
OBJECTIVES: dict[str, Any] = AUDIO_OBJECTIVES | TEXT_OBJECTIVES
# Kinds without a plan of their own.
NOT_PLANNED = ('evaluate', 'probe')
# Fields of an objective that follow from the rest of the experiment.
DERIVED = ('name', 'vocabulary_size', 'num_mels')

EXPERIMENT: dict[str, Any] = {
    'name': '',
    'seed': 0,
    # Where prepared corpora live; '' is <workdir>/corpora.  Experiments may share a folder.
    'data_dir': '',
    'corpora': {},
    'selections': {},
    'tokenizer': {
        'model_type': 'char',
        'vocabulary_size': 64,
        'selection': '',
        'normaliser': 'english',
    },
    # Feature statistics are taken from this many seconds of this selection.
    'statistics': {'selection': '', 'seconds': 3600.0},
    'audio': dataclasses.asdict(AudioConfig()),
    'encoder': {},
    'compute': {
        'mesh': {'slice': 1, 'data': -1, 'fsdp': 1, 'tensor': 1},
        # Largest share of the parameters that may lie whole on every device of a mesh that splits
        # parameters (fsdp or tensor above 1); more is taken for an accident.
        'max_replicated': 0.02,
        'compilation_cache': '',
        'tensorboard': True,
        # Seconds of audio a core trains on in a second, for the time left before it is measured.
        'expected_speed': 60.0,
        # Stage -> hours of one pass over its data, for `bigssl plan`; 0: not known.
        'pass_hours': {},
        # A step that takes longer is taken for hung: after this time the stacks of all threads are
        # written down, after twice this time the process ends.  Longer than compiling, one pass
        # over the dev set and one save together; 0: never.
        'watchdog_minutes': 30.0,
    },
    'stages': {},
    'recipe': (),
}

CORPUS: dict[str, Any] = {
    'manifest': '',
    # Splits for entries of a manifest that name none, drawn so that one 'group', 'speaker' or 'id'
    # stays together: 85 % train, 5 % dev, 10 % test.  '' keeps what the manifest says.
    'split_by': '',
    'tfds': '',
    'open_voices': (),
    # Only these speakers of the open_voices sets; () is all.
    'speakers': (),
    # Speech synthesised when open_voices cannot be had; hours of it, 0: never.
    'fallback_synthetic_hours': 0.0,
    # Folder with the .deb files of open_voices, for systems without apt.
    'deb_dir': '',
    # The largest share of the utterances that may be put aside since their audio cannot be used.
    'max_quarantine': 0.1,
}

STREAM: dict[str, Any] = {
    'sources': {},
    'batch_seconds': 64.0,
    'num_buckets': 3,
    'min_seconds': 0.5,
    'max_seconds': 15.0,
    'max_labels': 256,
    # Rows of a batch are a multiple of this; 0: of what the mesh and the micro-batches need. Which
    # utterances form a batch depends on it: set it (say to 256) to continue a run on another mesh.
    'rows_multiple': 0,
    'rates': 'weights',
    # Largest shares of the texts that may be unusable, and that may hold unknown characters.
    'max_left_out': 0.5,
    'max_unknown': 0.05,
}

SOURCE: dict[str, Any] = {'selection': '', 'labels': '', 'filter': None, 'weight': 1.0}

OPTIMIZER: dict[str, Any] = {'groups': {}, 'clip_norm': 5.0, 'ema_decay': 0.0, 'micro_batches': 1}

TRAINING: dict[str, Any] = {
    'kind': '',
    'steps': 1000,
    # A stage before this one, or a model folder of another workdir ('runs/other/pretrain').
    'init_from': '',
    # Objectives whose heads start from there as well; the tokenizer must be the same.
    'init_heads': (),
    'objectives': {},
    'streams': {},
    'spec_augment': None,
    'speed_perturb': None,
    'noise': None,
    'optimizer': OPTIMIZER,
    'log_every': 20,
    'eval_every': 0,
    'dev': '',
    'decoder': DECODER,
    'save_every': 500,
    # Checkpoints that stay: the newest, those of every n-th step, those with the lowest dev WER.
    'keep': 2,
    'keep_every': 0,
    'keep_best': 0,
    # The model is the state of the 'last' step, or of the 'best' (lowest dev WER) that was kept.
    'export': 'last',
    # When training goes back to a checkpoint, and how often.
    'divergence': dataclasses.asdict(GuardSettings()),
}

# A language model has no encoder, hears nothing and starts from nothing.
LANGUAGE_MODEL: dict[str, Any] = {
    name: default
    for name, default in TRAINING.items()
    if name not in ('init_from', 'init_heads', 'spec_augment', 'speed_perturb', 'noise', 'decoder')
}

TEXT_STREAM: dict[str, Any] = {
    'sources': {},
    # Padded tokens of a batch, </s> included.
    'batch_tokens': 8192,
    'num_buckets': 4,
    # Longer sentences are left out and counted.
    'max_tokens': 256,
    'rows_multiple': 0,
    'rates': 'weights',
}

# Either the transcripts of a selection, or text files (.txt, .gz), one sentence a line.
TEXT_SOURCE: dict[str, Any] = {'selection': '', 'texts': (), 'weight': 1.0}

OBJECTIVE: dict[str, Any] = {'objective': '', 'stream': '', 'weight': 1.0}

KINDS: dict[str, dict[str, Any]] = {
    'pretrain': TRAINING,
    'finetune': TRAINING,
    'language_model': LANGUAGE_MODEL,
    'pseudo_label': PSEUDO_LABEL,
    'evaluate': {
        'kind': '',
        'models': (),
        # Selections to score on; tables and report keep this order.
        'sets': (),
        'compare': (),
        'decoder': DECODER,
        'tune': TUNE,
        'batch_seconds': 128.0,
        'num_buckets': 6,
        'report_clips': 40,
    },
    # An n-gram model over the tokenizer's pieces, of the transcripts of a selection.
    'ngram': {'kind': '', 'selection': '', 'order': 4},
    'probe': PROBE,
}


def resolve(config: Any) -> dict[str, Any]:
    """The experiment with every default filled in, as plain dicts.

    Raises:
      ConfigError: an unknown field (naming the nearest), a wrong type, a reference to nothing.
    """
    given = to_dict(config)
    own = {k: v for k, v in given.items() if k != 'encoder'}
    resolved = merge('', EXPERIMENT, own, OPTIONAL)
    check_names(resolved)
    resolved['encoder'] = _encoder(given.get('encoder', {}))
    num_mels = AudioConfig(**resolved['audio']).num_mels
    if resolved['encoder']['num_mels'] != num_mels:
        raise ConfigError(
            f'config field encoder.num_mels is {resolved["encoder"]["num_mels"]}, but'
            f' audio.num_mels is {num_mels}; set both to the same number'
        )
    resolved['corpora'] = _table('corpora', resolved['corpora'], CORPUS)
    for name, corpus in resolved['corpora'].items():
        choose(f'corpora.{name}.split_by', corpus['split_by'], ('', 'group', 'speaker', 'id'))
    if not resolved['corpora']:
        raise ConfigError('config field corpora is empty; name at least one corpus')
    stages = {}
    for name, fields in resolved['stages'].items():
        kind = choose(f'stages.{name}.kind', group(f'stages.{name}', fields).get('kind'), KINDS)
        stages[name] = merge(f'stages.{name}', KINDS[kind], fields)
        check_pairs(f'stages.{name}.compare', stages[name].get('compare', ()))
        check_decoder(f'stages.{name}', stages[name])
        if 'objectives' in KINDS[kind]:
            stages[name] = _training_stage(f'stages.{name}', stages[name])
        if kind == 'pseudo_label':
            check_labelling(f'stages.{name}', stages[name])
            check_steps(f'stages.{name}.filter', stages[name]['filter'], name)
        if kind == 'probe':
            check_probe(f'stages.{name}', stages[name])
    resolved['stages'] = stages
    compute = resolved['compute']
    unknown = {name: 0.0 for name, stage in stages.items() if stage['kind'] not in NOT_PLANNED}
    compute['pass_hours'] = merge('compute.pass_hours', unknown, compute['pass_hours'])
    check_values(resolved)
    _check_references(resolved)
    return resolved


def _table(field: str, entries: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    check_table(field, entries)
    return {
        name: merge(f'{field}.{name}', defaults, entry, OPTIONAL) for name, entry in entries.items()
    }


def _encoder(given: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of the ConformerConfig that `encoder.preset` and its overrides make."""
    overrides = {k: v for k, v in group('encoder', given).items() if k != 'preset'}
    preset = choose('encoder.preset', given.get('preset', 'tiny'), NAMES)
    fields = merge('encoder', dataclasses.asdict(conformer(preset)), overrides)
    try:
        ConformerConfig(**fields)
    except ConfigError as error:
        raise ConfigError(str(error).replace('model.', 'encoder.')) from error
    return {'preset': preset, **fields}


def _training_stage(field: str, stage: dict[str, Any]) -> dict[str, Any]:
    for name, config in (
        ('spec_augment', SpecAugmentConfig),
        ('speed_perturb', SpeedConfig),
        ('noise', NoiseConfig),
    ):
        if stage.get(name) is not None:
            defaults = dataclasses.asdict(config())
            stage[name] = merge(f'{field}.{name}', defaults, stage[name])
            config(**stage[name])
    check_keeping(field, stage)
    of_text = stage['kind'] == 'language_model'
    stage['streams'] = _table(
        f'{field}.streams', stage['streams'], TEXT_STREAM if of_text else STREAM
    )
    for name, stream in stage['streams'].items():
        path = f'{field}.streams.{name}'
        stream['sources'] = _table(
            f'{path}.sources', stream['sources'], TEXT_SOURCE if of_text else SOURCE
        )
        if not stream['sources']:
            raise ConfigError(f'config field {path}.sources is empty; name at least one source')
        for source, fields in stream['sources'].items():
            if of_text:
                check_texts(f'{path}.sources.{source}', fields)
            else:
                check_steps(f'{path}.sources.{source}.filter', fields['filter'], fields['labels'])
    objectives = {}
    check_table(f'{field}.objectives', stage['objectives'])
    for name, fields in stage['objectives'].items():
        path = f'{field}.objectives.{name}'
        allowed = TEXT_OBJECTIVES if of_text else AUDIO_OBJECTIVES
        objective = choose(f'{path}.objective', fields.get('objective'), allowed)
        defaults = OBJECTIVE | {
            f.name: f.default
            for f in dataclasses.fields(OBJECTIVES[objective])
            if f.name not in DERIVED
        }
        objectives[name] = merge(path, defaults, fields)
        try:
            make_objective(objectives[name], vocabulary_size=2, num_mels=80)
        except ValueError as error:
            raise ConfigError(f'{path}: {error}') from error
        if objectives[name]['stream'] not in stage['streams']:
            raise unknown_field(f'{field}.streams', objectives[name]['stream'], stage['streams'])
        sources = stage['streams'][objectives[name]['stream']]['sources']
        silent = [source for source, given in sources.items() if not given.get('labels', 'text')]
        if objective in TRANSCRIPT and silent:
            raise ConfigError(
                f'{path} needs labels, and source {silent[0]!r} of stream'
                f" {objectives[name]['stream']!r} has none; set its `labels` to 'text' or to the"
                ' name of a pseudo_label stage'
            )
    if not objectives:
        raise ConfigError(f'config field {field}.objectives is empty; name at least one objective')
    stage['objectives'] = objectives
    _check_heads(field, stage)
    groups = stage['optimizer']['groups'] or {'all': {}}
    stage['optimizer']['groups'] = _table(f'{field}.optimizer.groups', groups, GROUP_DEFAULTS)
    for name, given in stage['optimizer']['groups'].items():
        path = f'{field}.optimizer.groups.{name}'
        choose(f'{path}.algorithm', given['algorithm'], ALGORITHMS)
        choose(f'{path}.schedule', given['schedule'], SHAPES)
    return stage


def _check_heads(field: str, stage: Mapping[str, Any]) -> None:
    objectives = stage['objectives']
    writing = [name for name, given in objectives.items() if given['objective'] in TRANSCRIPT]
    if 'init_heads' not in stage:
        return
    for name in stage['init_heads']:
        choose(f'{field}.init_heads', name, writing)
    if stage['init_heads'] and not stage['init_from']:
        raise ConfigError(
            f'config field {field}.init_heads is {stage["init_heads"]!r}, but init_from names no'
            ' stage to take heads from; set it, or set init_heads to ()'
        )


def make_objective(fields: Mapping[str, Any], vocabulary_size: int | None, num_mels: int) -> Any:
    """The objective that a config entry (or an entry of model.json) describes."""
    objective = OBJECTIVES[fields['objective']]
    derived = {'vocabulary_size': vocabulary_size, 'num_mels': num_mels}
    known = {field.name for field in dataclasses.fields(objective)} - {'name'}
    return objective(**{k: v for k, v in {**fields, **derived}.items() if k in known})


def training_audio_seconds(config: Mapping[str, Any], name: str) -> float:
    """Seconds of audio, padding included, that a stage trains on."""
    fields = config['stages'].get(name, {})
    used = {objective['stream'] for objective in fields.get('objectives', {}).values()}
    seconds = sum(fields['streams'][stream].get('batch_seconds', 0.0) for stream in used)
    return float(fields.get('steps', 0) * seconds)


def _check_references(config: Mapping[str, Any]) -> None:
    """Every name that a field refers to exists, and is made before it is needed."""
    selections = config['selections']
    for name, selection in _table('selections', selections, selection_lib.DEFAULTS).items():
        if selection['corpus'] not in config['corpora']:
            unknown = unknown_field('corpora', selection['corpus'], config['corpora'])
            raise ConfigError(f'config field selections.{name}.corpus: {unknown}')
        for other in check_selection(name, selections):
            _must_exist(f'selections.{name}.exclude', other, selections)
    _must_exist('statistics.selection', config['statistics']['selection'], selections)
    if config['tokenizer']['selection']:
        _must_exist('tokenizer.selection', config['tokenizer']['selection'], selections)
    before: list[str] = []
    for name in config['recipe']:
        _must_exist('recipe', name, config['stages'])
        for field, upstream, kinds in _uses(config['stages'][name]):
            if upstream not in before:
                raise ConfigError(
                    f'stages.{name} needs stage {upstream!r}, which is not before it in recipe'
                    f' {tuple(config["recipe"])}'
                )
            kind = config['stages'][upstream]['kind']
            if kind not in kinds:
                raise ConfigError(
                    f'stages.{name}.{field} is {upstream!r}, a {kind} stage; it must name a'
                    f' {" or ".join(kinds)} stage'
                )
        check_labels(name, config['stages'])
        for field, selection in _selections_of(config['stages'][name]):
            _must_exist(f'stages.{name}.{field}', selection, selections)
        if 'compare' in config['stages'][name]:
            check_compare(name, config['stages'])
        if not config['tokenizer']['selection'] and _has_labels(config['stages'][name]):
            raise ConfigError(
                f'config field tokenizer.selection is not set, but stages.{name} learns from'
                ' labels; name the selection whose texts train the tokenizer'
            )
        before.append(name)


def _has_labels(stage: Mapping[str, Any]) -> bool:
    streams = stage.get('streams', {}).values()
    return any(
        source.get('labels', 'text') for stream in streams for source in stream['sources'].values()
    )


def _must_exist(field: str, name: str, table: Collection[str]) -> None:
    if name not in table:
        raise ConfigError(
            f'config field {field} is {name!r}, which is not defined; defined: {sorted(table)}'
        )


def upstream_of(stage: Mapping[str, Any]) -> list[str]:
    """The stages whose results `stage` uses."""
    return list(dict.fromkeys(name for _, name, _ in _uses(stage)))


def _uses(stage: Mapping[str, Any]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(field, name of a stage, kinds that it may have) of every stage that `stage` refers to."""
    found: list[tuple[str, str | None, tuple[str, ...]]] = [
        ('teacher', stage.get('teacher'), ('finetune',)),
    ]
    if not is_path(stage.get('init_from', '')):
        found.insert(0, ('init_from', stage.get('init_from'), ('pretrain', 'finetune')))
    heard = ('pretrain', 'finetune') if stage.get('kind') == 'probe' else ('finetune',)
    found += [('models', name, heard) for name in stage.get('models', ()) if not is_path(name)]
    found += [('compare', name, ('evaluate',)) for name in other_stages(stage)]
    found += language_model_stages(stage.get('decoder', {}))
    for field, _, steps in filters_of(stage, ''):
        found += [(field, name, ('pseudo_label',)) for name in fitted_on(steps)]
    for stream_name, stream in stage.get('streams', {}).items():
        for name, source in stream['sources'].items():
            if source.get('labels', 'text') != 'text':
                field = f'streams.{stream_name}.sources.{name}.labels'
                found.append((field, source['labels'], ('pseudo_label',)))
    return [(field, name, kinds) for field, name, kinds in found if name]


def _selections_of(stage: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [('selection', stage['selection'])] if 'selection' in stage else []
    found += [('sets', name) for name in stage.get('sets', ())]
    found += probe_selections(stage)
    if stage.get('dev'):
        found.append(('dev', stage['dev']))
    if stage.get('tune', {}).get('selection'):
        found.append(('tune.selection', stage['tune']['selection']))
    for stream_name, stream in stage.get('streams', {}).items():
        for name, source in stream['sources'].items():
            if not source.get('texts'):
                found.append((f'streams.{stream_name}.sources.{name}', source['selection']))
    return found


def identity_of(config: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Everything that a stage's result follows from: its fields, the shared ones, its inputs."""
    shared = ('seed', 'audio', 'encoder', 'tokenizer', 'statistics', 'corpora', 'selections')
    given = {} if stage == 'prepare' else config['stages'][stage]
    fields = without(FREE, given)
    upstream = upstream_of(fields)
    if is_path(fields.get('init_from', '')):
        with_heads = bool(fields['init_heads'])
        fields['init_from'] = encoder_identity(stage, fields['init_from'], with_heads)
    if fields.get('kind') == 'probe':
        fields['models'] = probed_models(fields)
    if 'decoder' in fields:
        fields['decoder'] = fields['decoder'] | file_hashes(fields['decoder'])
    return {
        'stage': stage,
        'fields': fields,
        'shared': {name: without(FREE, config[name]) for name in shared},
        'upstream': {name: config_hash(identity_of(config, name)) for name in upstream},
    }
