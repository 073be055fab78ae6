"""Discovery: where a model has units that can go. `find` is the way in; it proves what the other files propose.

May import: surgery, adapters, core, modules, errors.
"""
