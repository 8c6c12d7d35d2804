"""Where transcripts go: text or JSON Lines on standard output, or a file that can be continued.

    out.jsonl.partial   first line: what the lines follow from (model, windows); then one line a
                        file, in the order of the files, flushed as it comes
    out.jsonl           the lines alone, written when all are there

A command that was interrupted finds the partial file: when its first line says the same, and its
lines are those of the first files of this command, they are kept.  A line that a kill cut in two is
made again.
"""

import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from bigssl_jax.config import UserError


class TranscriptFile:
    """Takes lines, one for each file, in order; a context manager.

    Args:
      output: the file; None prints `name: text`, '-' prints JSON Lines.
      identity: what the lines follow from; plain JSON.
      names: of all files, in order.
      overwrite: whether an output file that is there may be replaced.

    Attributes:
      kept: lines of an earlier, interrupted command.
      count: lines so far; `failed`: those with an error; `seconds`: of audio in the others.
      lines: the lines, unless they go to a file.
      on_disk: whether they do.

    Raises:
      UserError: an output file that is there, a partial one of another command, no way to write.
    """

    def __init__(
        self,
        output: str | None,
        identity: Mapping[str, Any],
        names: Sequence[str],
        overwrite: bool = False,
    ):
        self._output = output
        self.on_disk = output not in (None, '-')
        self.kept = self.count = self.failed = 0
        self.seconds = 0.0
        self.lines: list[Mapping[str, Any]] = []
        self._file: TextIO | None = None
        if not self.on_disk:
            return
        assert output is not None
        if os.path.exists(output) and not overwrite:
            raise UserError(f'--output {output} is there already; name another, or --overwrite it')
        self._partial = pathlib.Path(f'{output}.partial')
        try:
            self._open(dict(identity), names)
        except OSError as error:
            raise UserError(f'--output {output}: {error.strerror}') from error

    def _open(self, identity: dict[str, Any], names: Sequence[str]) -> None:
        """Opens the partial file behind the lines that are kept."""
        whole = 0
        if self._partial.exists():
            whole = self._keep(identity, names)
        self._file = self._partial.open('r+' if whole else 'w', encoding='utf-8')
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._file.write(json.dumps(identity) + '\n')
            self._file.flush()

    def _keep(self, identity: dict[str, Any], names: Sequence[str]) -> int:
        """Counts the lines of the partial file; returns the bytes that are kept of it."""
        whole = 0
        with self._partial.open('rb') as file:
            for number, text in enumerate(file):
                if not text.endswith(b'\n'):
                    break
                line = json.loads(text)
                if number == 0 and line != identity:
                    raise UserError(
                        f'{self._partial} was made with another model or other windows; delete it'
                        ' to begin anew'
                    )
                if number and line['id'] not in names[number - 1 : number]:
                    raise UserError(
                        f'{self._partial}:{number + 1} is of {line["id"]!r}, which is not file'
                        f' {number} of this command; delete it to begin anew'
                    )
                if number:
                    self._tally(line)
                whole += len(text)
        self.kept = self.count
        return whole

    def _tally(self, line: Mapping[str, Any]) -> None:
        self.count += 1
        self.failed += 'error' in line
        self.seconds += line.get('seconds', 0.0)

    def write(self, line: Mapping[str, Any]) -> None:
        """Takes the next file's line."""
        self._tally(line)
        text = json.dumps(line, ensure_ascii=False)
        if self._file is not None:
            self._file.write(text + '\n')
            self._file.flush()
            return
        self.lines.append(line)
        if self._output == '-':
            print(text, flush=True)
        elif 'text' in line:
            print(f'{line["id"]}: {line["text"]}', flush=True)

    def finish(self) -> None:
        """All lines are there: gives the file its name."""
        if self._file is None:
            return
        assert self._output is not None
        self._file.close()
        temporary = pathlib.Path(f'{self._output}.tmp')
        with self._partial.open('rb') as lines, temporary.open('wb') as file:
            next(lines)
            for text in lines:
                file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._output)
        self._partial.unlink()

    def __enter__(self) -> 'TranscriptFile':
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            if not self._file.closed and self.count:
                kept = f'{self.count} lines are kept in {self._partial}'
                print(f'{kept}; the same command continues', file=sys.stderr)
            self._file.close()
