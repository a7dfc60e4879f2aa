"""The proof behind every mask: the text is the template's own words with the row's values in their places.

marks.py    a row with numbered marks for its values, and the skeleton that the template makes of it
shape.py    where replies end and turns begin, for all rows that differ in their values only
prover.py   a row's text held against its shape: what is missing, which control token ends which reply
"""
