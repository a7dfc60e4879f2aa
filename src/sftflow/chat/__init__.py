"""From a row to ids and a loss mask, in the order in which one conversation passes through.

data_files.py        files and hub data sets: rows with their places
schema.py            the canonical conversation, and the dialects that are normalised into it
format.py            chat formats: a checkpoint's own template, a built-in one (formats/), a .jinja file
template.py          the format's Jinja template: messages -> text
encode.py            text -> ids, where only the template's own control tokens are special (fast_bpe.py: the short way)
proof/               which words are the template's, where replies end
render.py            the three together: conversation -> ids and mask
verify.py            the same invariants, checked again from the ids

template_options.py  template arguments and a missing end of turn, built into the template
tool_format.py       how a template writes tool calls; tool_parser.py reads them back from a reply
"""
