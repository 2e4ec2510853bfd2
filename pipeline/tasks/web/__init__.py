"""Tasks on the web: a page, server-sent events, and cancelling, as one ASGI application to mount or to serve.

- `app`: the application, made for a `TaskHub`; `answers`: what its responses are made of; `static`: the page
- `sse`: one client that follows one task
- `guard`: who may ask; decisions only, and the middleware that asks for them
- `serve`: the command; `stopping`: how a hub is shut down in bounded time; `listen`: sockets
- `bodies`: what clients send

Nothing is imported here, for only `penstock[web]` brings what the application needs.
"""
