"""One cell: amounts, dates, words for no value, and the spelling of categories."""
