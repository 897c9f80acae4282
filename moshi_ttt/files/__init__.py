"""Files of states: whole or not there, and checked before they are used."""
