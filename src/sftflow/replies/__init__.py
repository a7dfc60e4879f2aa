"""A model's replies to all rows of a file, in its order: for labelling, and for looking.

questions    a row of any dialect -> what is asked of it; a reply -> the row that is written
asking       all rows: looked at first, then asked side by side, and given out in their order
reply_file   the replies on disk as they come, so that the same command goes on from them
"""
