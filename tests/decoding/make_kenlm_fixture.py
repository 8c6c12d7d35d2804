"""Writes `kenlm_fixture.json`: an ARPA model and the scores that KenLM gives with it.

    python -m venv kenlm-env && kenlm-env/bin/pip install kenlm==0.3.0
    python tests/decoding/make_kenlm_fixture.py kenlm-env/bin/python

The model is an irregular one: pruned by hand, so that contexts are missing on some backoff paths,
with weights that no estimator would give.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

ARPA = """\\data\\
ngram 1=7
ngram 2=7
ngram 3=4

\\1-grams:
-99\t<s>\t-0.31
-1.1\t</s>
-1.7\t<unk>\t-0.05
-0.6\ta\t-0.42
-0.8\tb\t-0.17
-0.95\tc\t-0.29
-1.4\td

\\2-grams:
-0.25\t<s> a\t-0.11
-0.7\ta b\t-0.23
-0.5\tb a\t0
-0.9\tb c\t-0.37
-0.65\tc </s>
-1.2\tc a\t-0.07
-1.05\t<unk> a

\\3-grams:
-0.15\t<s> a b
-0.33\ta b c
-0.21\tb c a
-0.44\tb a b

\\end\\
"""
SENTENCES = [
    '',
    'a',
    'a b',
    'a b c',
    'a b c a b',
    'b a b a',
    'c c c',
    'd a',
    'a d b',
    'x a',
    'a x x b',
    'b c a c b a d c a b',
    'c a b c a x d',
]
SCORE = """
import json, sys, kenlm
model = kenlm.Model(sys.argv[1])
print(json.dumps([model.score(text, bos=True, eos=True) for text in json.load(sys.stdin)]))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'model.arpa'
        path.write_text(ARPA)
        done = subprocess.run(
            [sys.argv[1], '-c', SCORE, str(path)],
            input=json.dumps(SENTENCES),
            capture_output=True,
            text=True,
            check=True,
        )
    fixture = {
        'kenlm': '0.3.0',
        'arpa': ARPA,
        'sentences': SENTENCES,
        'log10': json.loads(done.stdout),
    }
    out = pathlib.Path(__file__).with_name('kenlm_fixture.json')
    out.write_text(json.dumps(fixture, indent=1))


if __name__ == '__main__':
    main()
