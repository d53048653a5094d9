# Sourced by scripts/quickstart and scripts/test: sets PYTHON to an interpreter that the lock file fits.
PYTHON=
for candidate in "${SPARSESPEC_BASE_PYTHON:-}" python3.11 python3.12 python3 python; do
  [ -n "$candidate" ] || continue
  if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
    PYTHON=$candidate
    break
  fi
done
if [ -z "$PYTHON" ]; then
  echo "error: no Python 3.11 or 3.12 (with venv) found; install one, or name it in SPARSESPEC_BASE_PYTHON." >&2
  exit 1
fi
