"""The one exception that means "the user's input is wrong", as opposed to a defect of ours."""


class InputError(ValueError):
    """Bad input from outside: a recipe key, a file, a row, a checkpoint.

    The message is one line that names what was wrong and where (key, file, row). The command line prints it and exits
    with code 2; any other exception is a defect and keeps its traceback.
    """
