"""Tasks that survive: rows of a PostgreSQL database, done by workers that may die.

The queue is procrastinate's. The rooms:

- `backend`: the front door; `settings`: what can be chosen; `command`: `penstock worker`
- `database`: connections; `schema`: tables; `store`: statements; `queue`: procrastinate
- `worker`: takes jobs; `attempt`: does one; `journal`: writes what it tells
- `sweeper`: finds what nobody works on; `retention`: forgets what is old
- `listener`: hears the database call; `mirrors`: the events of watched tasks
"""

from importlib import import_module

try:
    for _name in ("procrastinate", "psycopg", "psycopg_pool"):
        import_module(_name)
except ImportError as error:
    raise ImportError("tasks in PostgreSQL need an extra: pip install 'penstock[postgres]'") from error

from .backend import PostgresTaskBackend

__all__ = ["PostgresTaskBackend"]
