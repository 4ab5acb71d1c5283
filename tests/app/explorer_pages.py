"""What tests of pages have in common."""

from __future__ import annotations

import time

from streamlit.testing.v1 import AppTest

from weightspace.explorer import server as servers


def settle(app: AppTest, seconds: float = 120) -> AppTest:
    """Run a page again until nothing is in work, as its bar does; a traceback on it is a failure."""
    end = time.monotonic() + seconds
    while True:
        assert not app.exception, [e.value for e in app.exception]
        jobs = servers.server().jobs.running()
        # A job may have ended after the page drew its bar, and before it was asked for here.
        if not jobs and not app.get("progress"):
            return app
        assert time.monotonic() < end, [job.title for job in jobs]
        if jobs:
            jobs[0].wait(5)
        app.run()


def texts(app: AppTest) -> str:
    """All words on a page."""
    kinds = (app.title, app.subheader, app.markdown, app.caption, app.info, app.success, app.warning, app.error)
    # Words from files are escaped, so that no Markdown in them is drawn.
    return "\n".join(str(one.value) for kind in kinds for one in kind).replace("\\", "")
