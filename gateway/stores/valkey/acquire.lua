-- Returns a result that makes an upstream query unnecessary, or grants the lease for one.
--
-- KEYS    the task's three keys (common.lua)
-- ARGV    1 latest version known to the caller, 2 smallest version that is a result, 3 token,
--         4 duration of the lease in milliseconds
-- result  {now, kind, number, snapshot, failure}
--         kind      "fresh", "failure", "taken" or "lease"
--         number    lease: version of the next snapshot; failure, taken: milliseconds until it expires
--         snapshot  the stored one if it is newer than ARGV[1], otherwise ''
--         failure   the cached failure, or ''

local known, least = tonumber(ARGV[1]), tonumber(ARGV[2])
local latest = stored_snapshot()
local value = ''
if latest then
  if latest.version > known then value = latest.value end
  -- If the clock was set back, a snapshot may look fresh that is not: one from the future has an unknown age.
  local fresh = latest.fetched <= now and now < latest.fetched + latest.lifetime
  if fresh and latest.version >= least then return {now, 'fresh', 0, value, ''} end
end
local failure = redis.pcall('GET', KEYS[2])
if type(failure) == 'string' then
  return {now, 'failure', redis.call('PTTL', KEYS[2]), value, failure}
end
if lease_holder() then
  local left = redis.call('PTTL', KEYS[3])
  -- The gateway sets no lease without an expiry, and none that is longer.
  if left < 0 or left > tonumber(ARGV[4]) then redis.call('PEXPIRE', KEYS[3], ARGV[4]) end
  return {now, 'taken', redis.call('PTTL', KEYS[3]), value, ''}
end
redis.call('SET', KEYS[3], ARGV[3], 'PX', ARGV[4])
-- Larger than every earlier version, even after a failover to a server whose clock is behind.
local version = math.max(now, known + 1, latest and latest.version + 1 or 0)
return {now, 'lease', version, value, ''}
