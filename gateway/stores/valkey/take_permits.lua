-- Takes permits from the rate limiter that all replicas share: a token bucket with two classes of queries.
--
-- Refreshes are served first, so that new tasks on one replica do not delay the known tasks of another. But while
-- first queries are queued on any replica, one permit in four is for them. Permits are granted only for queries that are
-- queued now. So a change of the server's clock affects only the tokens in the bucket.
--
-- KEYS    1 a hash with the fields `tokens` and `refilled_at`; `refreshes_since`, the number of refreshes served
--           since the last first query; and for each replica a field "REFRESHES FIRST_QUERIES MOMENT", the number of
--           its queued queries of each class at that moment
-- ARGV    1 permits per second, 2 size of the bucket, 3 replica; 4 refreshes and 5 first queries queued on it
-- result  {granted refreshes, granted first queries, microseconds until the next token,
--          refreshes queued on other replicas, first queries queued on other replicas}

local RECENT, SHARE = 1000000, 4
local now = time_now()
local rate, size = tonumber(ARGV[1]), tonumber(ARGV[2])
local refreshes, first = tonumber(ARGV[4]), tonumber(ARGV[5])
local fields = redis.pcall('HGETALL', KEYS[1])
if fields.err then fields = discard(fields.err) end
local state = {tokens = size, refilled_at = now, refreshes_since = 0}
local other_refreshes, other_first = 0, 0
for index = 1, #fields, 2 do
  local name, value = fields[index], fields[index + 1]
  if state[name] then
    -- Digits only: tonumber would accept "nan", and a permit would never be granted again.
    local digits = #value <= 32 and string.match(value, '^%d+%.?%d*$')
    state[name] = digits and tonumber(digits) or 0
  elseif name ~= ARGV[3] then
    local queued, queued_first, moment = string.match(value, '^(%d+) (%d+) (%d+)$')
    if moment and math.abs(now - tonumber(moment)) < RECENT then
      other_refreshes, other_first = other_refreshes + tonumber(queued), other_first + tonumber(queued_first)
    else
      redis.call('HDEL', KEYS[1], name)
    end
  end
end
local elapsed = math.max(now - state.refilled_at, 0)
local tokens = math.min(math.max(state.tokens, 0) + elapsed * rate / 1000000, size)
local available = math.floor(tokens + 1e-9)
local since = math.min(state.refreshes_since, SHARE)
local granted, granted_first = 0, 0
while available > 0 do
  local first_due = first + other_first > 0 and (since >= SHARE - 1 or refreshes + other_refreshes == 0)
  if first_due and first > 0 then
    first, granted_first, since = first - 1, granted_first + 1, 0
  elseif not first_due and refreshes > 0 then
    refreshes, granted, since = refreshes - 1, granted + 1, since + 1
  else
    break  -- the next permit is for another replica
  end
  available = available - 1
end
tokens = tokens - granted - granted_first
local moment = text(now)
redis.call('HSET', KEYS[1], 'tokens', string.format('%.9f', tokens), 'refilled_at', moment,
  'refreshes_since', math.min(since, SHARE))
if refreshes + first > 0 then
  redis.call('HSET', KEYS[1], ARGV[3], refreshes .. ' ' .. first .. ' ' .. moment)
else
  redis.call('HDEL', KEYS[1], ARGV[3])
end
redis.call('PEXPIRE', KEYS[1], math.ceil(math.max(60, size / rate) * 1000))
return {granted, granted_first, math.ceil(math.max(1 - tokens, 0) * 1000000 / rate), other_refreshes, other_first}
