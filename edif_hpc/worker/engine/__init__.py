"""What runs researchers' code: the worker's side of it, the processes that do it, and what each of them needs.

pool, line, seat, launch, rerun   the worker's side: executors ready ahead of need, one job in each
cost, evidence                    what a job used, and why an executor died
values, messages, protocol        what passes between the processes
zygote, house, executor           the processes themselves; `environment` is what they are started with
walls/                            around an executor
model/                            fetched, loaded, on its device
weights/                          kept so that each request has them unchanged
request/                          one request, from its blob to its result or its error
"""
