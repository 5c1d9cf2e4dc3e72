"""The progress of a long loop: a bar on a terminal, lines elsewhere."""

import io

from util.cli.progress import ProgressLines, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_where_there_is_no_terminal():
    file = io.StringIO()
    progress = progress_bar(10, file=file)
    assert isinstance(progress, ProgressLines)
    progress.every = 0.0
    for _ in range(2):
        progress.update(5)
    progress.close()
    lines = file.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["5 of 10 images", "10 of 10 images"]
    assert lines[-1].endswith(" images/s")


def test_a_bar_on_a_terminal():
    file = Terminal()
    progress = progress_bar(4, "files", file, desc="reading")
    progress.update(4)
    progress.close()
    assert "reading: 100%" in file.getvalue() and "4/4" in file.getvalue() and "files/s" in file.getvalue()


def test_it_goes_to_standard_error(capsys):
    progress_bar(1).close()
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("0 of 1 images, ")
