"""`nestlearn serve`: one process, a page, and an endpoint that OpenAI's clients speak.

limits.py    what a request, a user and the whole may take
engines.py   what the server asks of a model; stacked.py, hope.py: the two that answer
shelf.py     a user's memories on disk: points to roll back to, forks, files
users.py     tokens, names, requests a minute
answers.py   answers token by token, several requests in turns
lessons.py   learning and studying: jobs that tell how far they are, and can be stopped
wire.py      JSON that is checked, errors and events as they go over the wire
chat.py      /v1/models, /v1/chat/completions, /v1/completions
rooms.py     /v1/memories, /v1/jobs
app.py       the application; guard.py: what every request passes first
page/        the page: HTML, CSS, JavaScript, as they are
"""

from .engines import engine_for
from .limits import Limits

__all__ = ["Limits", "engine_for"]
