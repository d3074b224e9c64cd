// Signs a query as the vendor's API gateway wants it (X-Ca-*, HMAC-SHA256), in njs 0.7.9 or newer.
//
// Each js_set variable of nginx.conf asks one function; the first of them to be asked signs, and
// leaves the parts in js_var variables for the others: one signature per upstream call.

import crypto from 'crypto';

const KEY = process.env.SPEEDPIX_APP_KEY;
const SECRET = process.env.SPEEDPIX_APP_SECRET;
const TYPE = 'application/json; charset=utf-8';
const PATH = '/scc/sd_get_progress';

function signed(request) {
    const parts = request.variables;
    if (parts.ca_signature_value) {
        return parts;
    }
    const now = Date.now();
    const body = '{"taskId":"' + parts.task_id + '"}';
    const md5 = crypto.createHash('md5').update(body).digest('base64');
    const date = new Date(now).toUTCString().replace('GMT', 'GMT+00:00');
    const hex = parts.request_id;  // 128 random bits, in the shape of a UUID below
    const nonce = hex.slice(0, 8) + '-' + hex.slice(8, 12) + '-4' + hex.slice(13, 16) + '-a' + hex.slice(17, 20) +
        '-' + hex.slice(20);
    const text = 'POST\n' + TYPE + '\n' + md5 + '\n' + TYPE + '\n' + date + '\nx-ca-key:' + KEY + '\nx-ca-nonce:' +
        nonce + '\nx-ca-signature-method:HmacSHA256\nx-ca-timestamp:' + now + '\n' + PATH;
    parts.ca_body_value = body;
    parts.ca_md5_value = md5;
    parts.ca_date_value = date;
    parts.ca_nonce_value = nonce;
    parts.ca_timestamp_value = String(now);
    parts.ca_signature_value = crypto.createHmac('sha256', SECRET).update(text).digest('base64');
    return parts;
}

function body(request) { return signed(request).ca_body_value; }
function md5(request) { return signed(request).ca_md5_value; }
function date(request) { return signed(request).ca_date_value; }
function nonce(request) { return signed(request).ca_nonce_value; }
function timestamp(request) { return signed(request).ca_timestamp_value; }
function signature(request) { return signed(request).ca_signature_value; }
function key() { return KEY; }

export default { body, md5, date, nonce, timestamp, signature, key };
