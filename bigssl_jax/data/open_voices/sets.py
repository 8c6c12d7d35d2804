"""The table of sets: which packages, which reader, whose voices, under which licence."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping

from bigssl_jax.data.errors import DataError
from bigssl_jax.data.open_voices import asterisk, festvox_ru, fillets, prompts, queen, tuxpaint
from bigssl_jax.data.open_voices.utterance import Utterance

VERSION = '1.0.0'  # of texts, ids and splits of all sets; a change of any is a new version
EXAM_DOMAIN = 'exam'  # for testing only: never in training


@dataclasses.dataclass(frozen=True)
class SpeechSet:
    """One set of recordings: `utterances(roots)` reads it from the folders of its packages."""

    name: str
    packages: tuple[str, ...]
    languages: tuple[str, ...]
    domain: str
    licence: str
    attribution: str
    description: str
    utterances: Callable[[Mapping[str, pathlib.Path]], Iterator[Utterance]]


def _asterisk(language: str, licence: str, attribution: str) -> SpeechSet:
    package = f'asterisk-core-sounds-{language}'
    return SpeechSet(
        name=f'ast_{language}',
        packages=(package, f'{package}-g722'),
        languages=(language,),
        domain=EXAM_DOMAIN if language == 'en' else 'telephone',
        licence=licence,
        attribution=attribution,
        description=f'Telephone exchange prompts ({language}), one voice, 16 kHz G.722, with texts',
        utterances=functools.partial(asterisk.utterances, language=language),
    )


def _fillets(language: str) -> SpeechSet:
    return SpeechSet(
        name=f'fillets_{language}',
        packages=('fillets-ng-data', f'fillets-ng-data-{language}'),
        languages=(language,),
        domain='game',
        licence='GPL-2.0-only',
        attribution='Fish Fillets NG: ALTAR interactive, Ivo Danihelka, Pavel Danihelka and others',
        description=f'Game dialogue ({language}), 22 kHz Ogg Vorbis, with texts',
        utterances=functools.partial(fillets.utterances, language=language),
    )


def _prompts(
    language: str, package: str, speaker: str, licence: str, attribution: str
) -> SpeechSet:
    return SpeechSet(
        name=f'prompts_{language}',
        packages=(package,),
        languages=(language,),
        domain='telephone',
        licence=licence,
        attribution=attribution,
        description=f'Telephone exchange prompts ({language}), one voice, 8 kHz, without texts',
        utterances=functools.partial(
            prompts.utterances, package=package, speaker=speaker, language=language
        ),
    )


DIGIUM = 'Digium, Inc. (http://www.digium.com); voice: '
ALL_SETS = (
    SpeechSet(
        name='queen',
        packages=('flight-of-the-amazon-queen',),
        languages=('en',),
        domain='game',
        licence='LicenseRef-Flight-of-the-Amazon-Queen (freeware, DFSG-free)',
        attribution='Flight of the Amazon Queen, (C) 1995 John Passfield and Steven Stamatiadis',
        description='Adventure game dialogue, about 50 characters, 12 kHz MP3, with texts',
        utterances=queen.utterances,
    ),
    _asterisk('en', 'CC-BY-SA-3.0', DIGIUM + 'Allison Smith'),
    _asterisk('es', 'CC-BY-SA-3.0', DIGIUM + 'Allison Smith'),
    _asterisk('fr', 'CC-BY-SA-3.0', DIGIUM + 'June Wallack (http://www.junewallack.com)'),
    _asterisk(
        'it', 'CC-BY-3.0',
        '(C) 2012 Carlo Flora (http://www.carloflora.com); translated by Silvia Petrin',
    ),
    _asterisk('ru', 'CC-BY-3.0', 'Maxim Topal, IvrvoiceRU (http://www.ivrvoice.ru)'),
    SpeechSet(
        name='ru',
        packages=('festvox-ru',),
        languages=('ru',),
        domain='studio',
        licence='LicenseRef-festvox-ru (BSD-like)',
        attribution='festvox-ru, (C) 2005 Nickolay V. Shmyrev',
        description='Sentences of novels, one voice in a studio, 16 kHz, with texts',
        utterances=festvox_ru.utterances,
    ),
    _fillets('cs'),
    _fillets('nl'),
    SpeechSet(
        name='tuxpaint',
        packages=('tuxpaint-stamps-default',),
        languages=('be', 'bg', 'ca', 'da', 'el', 'es', 'fr', 'lt', 'ml', 'nl', 'ro', 'ru'),
        domain='stamps',
        licence='GPL-2.0-or-later',
        attribution='Tux Paint stamps, (C) 2002-2022 Bill Kendrick and contributors',
        description='Names of animals and things, volunteers, 44 kHz Ogg Vorbis, without texts',
        utterances=tuxpaint.utterances,
    ),
    _prompts(
        'it', 'asterisk-prompt-it-menardi-wav', 'asterisk_menardi', 'CC-BY-SA-3.0-IT',
        '(C) 2006-2011 Marco Menardi and Paola Dal Zot (http://www.voip.ammdomus.it)',
    ),
    _prompts(
        'fr', 'asterisk-prompt-fr-armelle', 'asterisk_armelle', 'BSD-2-Clause-like',
        '(C) 2006 Michel Gutierrez; voice: Armelle Desjardins',
    ),
    _prompts(
        'es', 'asterisk-prompt-es-co', 'asterisk_july', 'GPL-2.0-only',
        'Avatar Ltda. / July E. Jiménez (http://www.avatar.com.co)',
    ),
)  # fmt: skip
SETS = {speech_set.name: speech_set for speech_set in ALL_SETS}


def find(name: str) -> SpeechSet:
    """The set called `name`; raises DataError that lists the names."""
    if name not in SETS:
        raise DataError(f'open_voices has no set {name!r}; sets are {", ".join(SETS)}')
    return SETS[name]
