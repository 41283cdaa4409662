"""Attacks on our own walls: what a hostile request tries, and what has to come of it at each level.

`payloads` has the code, `expected` says as data what becomes of each case, `runner` sends one through a real client and looks at what is left,
`knocks` are attempts on the relay by raw HTTP, and `page` writes docs/reference/attacks.md from all of it.
"""
