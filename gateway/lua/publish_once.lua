-- Publishes unless it was done under this key before, and remembers the answer.
--
-- KEYS[1]  string the answer given under an idempotency key
-- ARGV[1]  how long the answer is kept, in milliseconds
-- ARGV[2]  the answer to give
-- ARGV[3]  how long the last event of a cache channel is kept, in milliseconds
-- ARGV[4…] three each: pub/sub channel, publication, key of a cache channel's last event or empty
--
-- Returns the answer that was given before, and publishes nothing; else false.

local given = redis.call('GET', KEYS[1])
if given then
  return given
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1])
for i = 4, #ARGV, 3 do
  local publication, last = ARGV[i + 1], ARGV[i + 2]
  if last ~= '' then
    local body = string.sub(publication, 3 + string.byte(publication, 2))
    redis.call('SET', last, body, 'PX', ARGV[3])
    redis.call('DEL', last .. ':missed')
  end
  redis.call('PUBLISH', ARGV[i], publication)
end
return false
