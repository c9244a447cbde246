"""How types and shapes are checked while testing: as type checkers read them, so an int passes where a float is asked for."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
