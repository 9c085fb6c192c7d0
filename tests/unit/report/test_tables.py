"""Tables on a terminal: what users name is shown as it is, and does nothing else."""

from io import StringIO

from rich.console import Console

from fluvial.report.tables import table


def test_no_text_of_a_table_is_markup_or_drives_a_terminal() -> None:
    hostile = "a[/nope]\x1b[31m"
    written = StringIO()
    console = Console(file=written, width=100, force_terminal=True, color_system=None)
    console.print(table([hostile] * 2, [[hostile, "1"]], hostile, caption=hostile))
    assert written.getvalue().count("a[/nope]") == 5
    assert "\x1b[31m" not in written.getvalue()
