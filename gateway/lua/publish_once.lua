-- Publishes unless it was done under this key before, and remembers the answer.
--
-- KEYS[1]  string the answer given under an idempotency key
-- ARGV[1]  how long the answer is kept, in milliseconds
-- ARGV[2]  the answer to give
-- ARGV[3…] pairs: pub/sub channel, publication
--
-- Returns the answer that was given before, and publishes nothing; else false.

local given = redis.call('GET', KEYS[1])
if given then
  return given
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1])
for i = 3, #ARGV, 2 do
  redis.call('PUBLISH', ARGV[i], ARGV[i + 1])
end
return false
