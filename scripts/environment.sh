# Sourced by the launchers, from the repository's root: a Python with the requirements. An active virtual or conda
# environment is used as it is, but for conda's base, which is active without anyone's doing; otherwise .venv is made and
# filled once, and again when requirements.txt changes.
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
    if [ ! -x .venv/bin/python ]; then
        python3 -m venv .venv
    fi
    source .venv/bin/activate
    if ! cmp -s requirements.txt .venv/requirements.txt; then
        # torch first and alone: resolved among the others, a newer build could be tried before the pinned one
        python -m pip install --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
        python -m pip install --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/requirements.txt
    fi
fi
