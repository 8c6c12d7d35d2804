"""The report page: self-contained, well-formed, safe with hostile texts, tolerant of gaps."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
import soundfile

from bigssl_jax.evaluation.clips import choose_clips, write_clips
from bigssl_jax.evaluation.figures import Series, line_chart
from bigssl_jax.evaluation.report import Limits, write_report
from bigssl_jax.evaluation.workdir import WorkdirError

VOID = {'meta', 'br', 'img', 'input', 'link', 'hr'}


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.ids = [], [], '', []
        self._open = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or '') for name, value in attributes]
        self.ids += [value for name, value in attributes if name == 'id']
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] not in ('script', 'style'):
            self.text += data


@pytest.fixture(scope='module')
def page(made_run, tmp_path_factory):
    output = tmp_path_factory.mktemp('page') / 'report.html'
    return Page(write_report(made_run, output).read_text('utf-8'))


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, name, value in page.attributes:
        if name in ('src', 'href', 'xlink:href', 'action', 'srcset', 'data', 'poster'):
            assert value.startswith(('data:', '#')), (tag, name, value[:60])
        if name == 'style':
            assert 'url(' not in value or 'url(#' in value
    assert not {'link', 'iframe', 'object', 'embed', 'base', 'img'} & set(page.tags)
    policy = next(v for t, n, v in page.attributes if n == 'content' and 'default-src' in v)
    assert "default-src 'none'" in policy


def test_hostile_texts_stay_texts(page):
    assert page.tags.count('script') == 1
    assert not [name for _, name, _ in page.attributes if name.startswith('on')]
    assert '</script><script>alert(1)</script><img src=http://evil.example/x' in page.text


def test_identifiers_are_unique_and_references_resolve(page):
    assert len(page.ids) == len(set(page.ids))
    inner = [v[1:] for _, n, v in page.attributes if n in ('href', 'xlink:href') and v[0] == '#']
    inner += [i for _, _, v in page.attributes for i in re.findall(r'url\(#([^)]*)\)', v)]
    assert inner and set(inner) <= set(page.ids)


def test_pictures_follow_the_theme(page):
    colours = [v for _, n, v in page.attributes if n == 'style' and 'stroke:' in v]
    assert any('var(--series-1)' in value for value in colours)
    # No placeholder and no fixed colour is left: it would vanish on a light or a dark page.
    assert not [v for v in colours if re.search(r'stroke:\s*#', v)]
    assert page.tags.count('svg') == 4 + 6 + 5 + 2  # results, pretrain, finetune, labels
    assert all(n != 'aria-label' or v for _, n, v in page.attributes)


def test_all_sections_are_there(page):
    for words in ('quickstart', '0123456789abcdef', 'x86_64, 2 CPU cores', '7 of 7 done',
                  'Paired tests', 'is synthetic speech', 'Masked accuracy (best_rq)',
                  'WER on the dev set', 'WER of the labels kept', 'queen_test: 60 of 60',
                  'How the finetune stages differ', 'Fields that differ from their defaults',
                  'unlabelled', '3.40', 'hallucinated'):  # fmt: skip
        assert words in ' '.join(page.text.split()), words


def test_clips_play(page):
    sounds = [v for tag, name, v in page.attributes if (tag, name) == ('audio', 'src')]
    assert len(sounds) == 20
    head, _, body = sounds[0].partition(',')
    assert head == 'data:audio/mpeg;base64'
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(body)))
    assert rate == 16000 and 0.4 < len(samples) / rate < 0.7 and abs(samples).max() > 0.05


def test_audio_stops_at_its_limit(finished_run):
    text = write_report(finished_run, limits=Limits(audio_bytes=10_000)).read_text()
    sounds = re.findall(r'<audio[^>]*base64,([^"]*)"', text)
    assert 0 < sum(len(base64.b64decode(s)) for s in sounds) <= 10_000
    assert 'clips left out' in text


def test_utterances_stop_at_their_limit_and_keep_those_with_audio(finished_run):
    text = write_report(finished_run, limits=Limits(utterances=15)).read_text()
    assert 'queen_test: 15 of 60 utterances' in text
    assert text.count('<article') == 30
    assert text.count('<audio') == 20


def test_audio_may_come_from_a_callable(finished_run):
    def audio(name, identity):
        return b'fLaC....' if (name, identity) == ('ast_en', 'ast_en/0003') else None

    text = write_report(finished_run, audio=audio).read_text()
    assert re.findall(r'src="(data:[^;]*)', text) == ['data:audio/flac']


def test_clips_outside_their_folder_are_not_read(finished_run):
    (finished_run / 'test' / 'secret').write_bytes(b'RIFFsecret')
    clips = finished_run / 'test' / 'audio' / 'ast_en' / 'clips.json'
    clips.write_text(json.dumps({'ast_en/0003': '../../secret'}))
    assert base64.b64encode(b'RIFFsecret').decode() not in write_report(finished_run).read_text()


def test_worst_utterances_come_first(finished_run):
    text = write_report(finished_run).read_text()
    first = text[text.index('queen_test: 60 of 60') :]
    errors = [
        int(n) for n in re.findall(r'data-errors="(\d+)"', first[: first.index('</details>')])
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]


def test_unfinished_runs_say_so(half_run):
    page = Page(write_report(half_run).read_text())
    text = ' '.join(page.text.split())
    assert '2 of 7 done' in text
    assert 'supervised (not finished: step 120 of 400)' in text
    assert 'No model has been scored yet.' in text
    assert 'Loss' in text and 'Pseudo-labels' not in text


def test_page_is_reproducible(finished_run):
    first = write_report(finished_run, finished_run / 'a.html').read_bytes()
    assert write_report(finished_run, finished_run / 'b.html').read_bytes() == first


def test_damaged_files_are_named(finished_run):
    path = finished_run / 'test' / 'hypotheses-ast_en.jsonl'
    path.write_text('{"id": "u1", "text": "x"}\n')
    with pytest.raises(WorkdirError, match=r"hypotheses-ast_en\.jsonl:1 .* no field 'reference'"):
        write_report(finished_run)
    assert not (finished_run / 'report.html').exists()


def test_unwritable_page_is_an_error(half_run):
    with pytest.raises(WorkdirError, match='cannot write'):
        write_report(half_run, half_run / 'missing' / 'report.html')


def test_curves_keep_their_last_point_and_gaps():
    y = [float('nan'), *range(2, 1000), 12345.0]
    svg = line_chart([Series('$x$', range(1000), y, 0)], 'a <b> "c"', 'step')
    assert 'aria-label="a &lt;b&gt; &quot;c&quot;"' in svg
    assert svg.count(' L ') + svg.count('\nL ') < 400


def test_clips_are_half_the_worst_and_half_the_rest():
    errors = np.arange(100)
    chosen = choose_clips(errors, 10)
    assert chosen[:5] == [99, 98, 97, 96, 95]
    assert len(set(chosen)) == 10 and min(chosen) < 20
    assert choose_clips([1, 5], 10) == [1, 0]
    assert choose_clips([], 10) == []


def test_clip_list_names_every_clip(tmp_path):
    folder = write_clips(tmp_path, 'test', ['a/b', '<x>'], lambda _: np.zeros(1600, np.int16))
    names = json.loads((folder / 'clips.json').read_text())
    assert list(names) == ['a/b', '<x>']
    assert all((folder / name).stat().st_size > 0 for name in names.values())
