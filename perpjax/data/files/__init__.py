"""Files as users have them, to the tables of `perpjax.data.contract`.

`read` opens a file by its content. `recognise` finds its columns, units and kind. `mend` sorts and joins the parts of
a series, where that changes no number. `judge` looks at the whole: candles, mark and funding of one symbol together.
Every step puts its findings into words, and refuses every guess that could change a number.
"""
