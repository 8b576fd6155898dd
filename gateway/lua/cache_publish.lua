-- Publishes the event of a cache channel and keeps it as the channel's last one.
--
-- KEYS[1]  string the channel's last event, its JSON body
-- KEYS[2]  string stands while a miss has been told and nothing was published since
-- ARGV[1]  pub/sub channel
-- ARGV[2]  the publication: version byte, length of the excluded socket id, that id, the body
-- ARGV[3]  how long the event is kept, in milliseconds
--
-- Returns how many nodes were subscribed.

redis.call('SET', KEYS[1], string.sub(ARGV[2], 3 + string.byte(ARGV[2], 2)), 'PX', ARGV[3])
redis.call('DEL', KEYS[2])
return redis.call('PUBLISH', ARGV[1], ARGV[2])
