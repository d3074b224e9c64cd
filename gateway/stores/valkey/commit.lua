-- Stores and publishes a snapshot, and ends the lease.
--
-- KEYS    the task's three keys (common.lua)
-- ARGV    1 token, 2 version, 3 fetched, 4 lifetime, 5 terminal, 6 encoding, 7 milliseconds to keep it;
--         in microseconds: 8 maximum delay of a message, 9 how long a snapshot may be served after its
--         lifetime, 10 the same for stale-if-error; 11 publish command, 12 channel, 13 subject
-- result  {now, 1, moment from which on it is served}, or {now, 0, the snapshot that is kept instead, or ''}

local version, terminal = tonumber(ARGV[2]), ARGV[5] == '1'
local holder = lease_holder()
local ours = holder == ARGV[1]
local latest = stored_snapshot()
-- Fencing: a paused holder commits after its lease has expired, when another replica has it. A terminal
-- snapshot is never replaced by a non-terminal one.
local expired = ARGV[1] ~= '' and holder and not ours
if expired or latest and (latest.version > version or latest.terminal and not terminal) then
  if ours then
    redis.call('DEL', KEYS[3])
    redis.call(ARGV[11], ARGV[12], 'R' .. ARGV[13])
  end
  return {now, 0, latest and latest.value or ''}
end
local shown = now
if latest then
  -- A replica that has not received this snapshot yet may still serve the previous one.
  local stale = tonumber(redis.call('EXISTS', KEYS[2]) == 1 and ARGV[10] or ARGV[9])
  if now < latest.fetched + latest.lifetime + stale then shown = now + tonumber(ARGV[8]) end
end
shown = string.format('%.0f', shown)
local fetched = string.format('%.0f', math.min(tonumber(ARGV[3]), now))
local value = table.concat({'sdg3', ARGV[2], fetched, ARGV[4], shown, ARGV[5]}, ' ') .. '\n' .. ARGV[6]
redis.call('SET', KEYS[1], value, 'PX', ARGV[7])
redis.call('DEL', KEYS[2])
if ours then redis.call('DEL', KEYS[3]) end
redis.call(ARGV[11], ARGV[12], 'S' .. ARGV[13] .. value)
return {now, 1, shown}
