from absent import names_of

__getattr__ = names_of(__name__)
__version__ = "0.28.0"
