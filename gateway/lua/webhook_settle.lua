-- Ends a claim: what was sent is removed; what could not be sent waits, or is given up.
--
-- KEYS[1]  zset   queue -> when it may be sent
-- KEYS[2]  hash   queue -> token of its claim
-- KEYS[3]  hash   queue -> failures in a row
-- KEYS[4]  stream the queue
-- KEYS[5]  hash   queue -> events that did not fit; "queue told" -> this stretch of them was told
-- ARGV[1]  token
-- ARGV[2]  the first entry that was not sent; empty when nothing was
-- ARGV[3]  the wait after a first failure, in milliseconds; it doubles with each
-- ARGV[4]  the longest wait
-- ARGV[5]  the age at which an event is given up
--
-- Returns {how many were removed, how many did not fit since the last time, 1 when these begin a
-- stretch}, or {-1} when another node has taken the queue over.

local queue = KEYS[4]
if redis.call('HGET', KEYS[2], queue) ~= ARGV[1] then
  return {-1}
end
redis.call('HDEL', KEYS[2], queue)

local now = hook_now()
local wait = 0
local removed
if ARGV[2] ~= '' then
  removed = redis.call('XTRIM', queue, 'MINID', '=', ARGV[2])
  redis.call('HDEL', KEYS[3], queue)
else
  removed = redis.call('XTRIM', queue, 'MINID', '=', string.format('%.0f', now - ARGV[5]))
  local failures = redis.call('HINCRBY', KEYS[3], queue, 1)
  wait = math.min(ARGV[3] * 2 ^ math.min(failures - 1, 30), tonumber(ARGV[4]))
end

local left = redis.call('XLEN', queue)
local told = queue .. ' told'
local dropped = tonumber(redis.call('HGET', KEYS[5], queue) or 0)
local begins = 0
if dropped > 0 then
  begins = redis.call('HSETNX', KEYS[5], told, 1)
  redis.call('HDEL', KEYS[5], queue)
end
-- A queue that is full loses some again and again: that is over when it is half empty.
if left < HOOK_EVENTS_MOST / 2 then
  redis.call('HDEL', KEYS[5], told)
end

if left == 0 then
  redis.call('DEL', queue)
  redis.call('ZREM', KEYS[1], queue)
  redis.call('HDEL', KEYS[3], queue)
else
  redis.call('ZADD', KEYS[1], now + wait, queue)
end
return {removed, dropped, begins}
