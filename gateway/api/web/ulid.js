// The creation time that a task ID may contain. The vendor's IDs look like ULIDs (see github.com/ulid/spec): their
// first ten characters are the time in milliseconds, in Crockford's base 32. The vendor's IDs have 25 characters, ULIDs 26.

const DIGITS = "0123456789abcdefghjkmnpqrstvwxyz";
const ULID = /^[0-7][0-9a-hjkmnp-tv-z]{24,25}$/i;
const LONGEST_SECONDS = 30 * 24 * 3600;

/** Return the time in an ID, in seconds, or null if it is not plausible: in the future, or older than 30 days. */
export function submittedAt(taskId, now) {
  if (!ULID.test(taskId)) return null;
  let ms = 0;
  for (const digit of taskId.slice(0, 10).toLowerCase()) ms = ms * 32 + DIGITS.indexOf(digit);
  const at = ms / 1000;
  return at <= now && now - at <= LONGEST_SECONDS ? at : null;
}
