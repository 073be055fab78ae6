"""The trade of accuracy against cost: `frontier` scores a model once, cuts it at many budgets, and measures each model.

`points` holds the values, `measure` does the work, `estimate` says how long it takes, `drawing` draws the plot and
`page` writes the HTML page.

May import: report, pipeline and all below them. To show one more number of a point, add it to `Point`, and then to
`Frontier.table` and to the page.
"""
