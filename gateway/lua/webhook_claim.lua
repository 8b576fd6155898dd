-- Claims queues that may be sent, and tells which ends count now.
--
-- KEYS[1]  zset   queue -> when it may be sent
-- KEYS[2]  hash   queue -> token of its claim
-- KEYS[3]  hash   queue -> failures in a row
-- KEYS[4]  zset   fact -> when it counts
-- KEYS[5]  hash   queue -> events that did not fit
-- ARGV[1]  token
-- ARGV[2]  how long a claim lasts, in milliseconds: then another node may send
-- ARGV[3]  how many queues to claim at most
-- ARGV[4]  how many facts to tell at most
--
-- Returns {claimed queues, facts}.

local now = hook_now()
local claimed = {}
for _, queue in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[3])) do
  if redis.call('EXISTS', queue) == 0 then
    redis.call('ZREM', KEYS[1], queue)
    redis.call('HDEL', KEYS[2], queue)
    redis.call('HDEL', KEYS[3], queue)
    redis.call('HDEL', KEYS[5], queue, queue .. ' told')
  else
    -- First what a full Redis does not refuse: then it lets the script go on, and the queue, which
    -- may be what has filled it, is sent and becomes shorter.
    redis.call('HDEL', KEYS[2], queue)
    redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), queue)
    redis.call('HSET', KEYS[2], queue, ARGV[1])
    claimed[#claimed + 1] = queue
  end
end
return {claimed, redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, ARGV[4])}
