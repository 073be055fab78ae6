"""Where a model has units that can go. `find` is the way in. The other files propose sites, and each is proved.

May import: surgery, adapters, core, modules, errors. A new way to find sites is a file here that `find` calls.
"""
