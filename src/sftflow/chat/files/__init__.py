"""What lies in a data file, and which files a name means.

names.py     a name -> its files: one, a pattern's, a folder's, a data set's; and where a row of them stands
sets.py      data sets with configurations and splits: on the hub, in a folder, saved by `datasets`
packed.py    a file's bytes, unpacked; what else it is
columns.py   rows of Parquet and Arrow                table.py     rows of CSV and TSV
"""
