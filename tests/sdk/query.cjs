// Asks one question with the vendor's npm client and prints what it gets, or how it was refused.
"use strict";

const { Client } = require("aliyun-api-gateway");

const [url, key, secret, taskId] = process.argv.slice(2);

new Client(key, secret)
  .post(url, {
    headers: { "content-type": "application/json; charset=utf-8" },
    data: { taskId },
    timeout: 10000,
  })
  .then((answer) => console.log(JSON.stringify({ answer })))
  .catch((error) => console.log(JSON.stringify({ status: error.code, headers: error.data && error.data.headers })))
  .finally(() => process.exit()); // its agent would keep the connection, and us, for 5 seconds
